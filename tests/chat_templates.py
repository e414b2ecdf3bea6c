"""Published chat templates, for parity with transformers: from the tokenizer_config.json of the
model that each is named after, on huggingface.co, with the special tokens that they use."""

# Name -> (template, begin of text, end of text, further special tokens, end of a turn).
TEMPLATES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
        "%}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt "
        "%}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>", "<|im_end|>", (), "<|im_end|>",
    ),
    "Qwen/Qwen2-7B-Instruct": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
        "%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif "
        "%}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
        "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% "
        "endif %}",
        None, "<|im_end|>", ("<|im_start|>",), "<|im_end|>",
    ),
    "HuggingFaceH4/zephyr-7b-beta": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' "
        "+ message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ "
        "'<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == "
        "'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif "
        "%}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif "
        "%}\n{% endfor %}",
        "<s>", "</s>", (), "</s>",
    ),
    "meta-llama/Llama-2-7b-chat-hf": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% "
        "set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = "
        "messages %}{% set system_message = false %}{% endif %}{% for message in "
        "loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
        "raise_exception('Conversation roles must alternate user/assistant/user/assistant/..."
        "') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content "
        "= '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% "
        "else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == "
        "'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif "
        "message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% "
        "endif %}{% endfor %}",
        "<s>", "</s>", (), "</s>",
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content "
        "= '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content "
        "= bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if "
        "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
        "endif %}",
        "<|begin_of_text|>", "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",), "<|eot_id|>",
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
        "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' "
        "%}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
        "'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only "
        "user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<s>", "</s>", (), "</s>",
    ),
    "google/gemma-7b-it": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System "
        "role not supported') }}{% endif %}{% for message in messages %}{% if "
        "(message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
        "raise_exception('Conversation roles must alternate user/assistant/user/assistant/..."
        "') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% "
        "else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + "
        "'\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if "
        "add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>",), "<end_of_turn>",
    ),
    "google/gemma-3-1b-it": (
        "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n    {%- if "
        "messages[0]['content'] is string -%}\n        {%- set first_user_prefix = "
        "messages[0]['content'] + '\n\n' -%}\n    {%- else -%}\n        {%- set "
        "first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n    {%- endif "
        "-%}\n    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n    {%- set "
        "first_user_prefix = \"\" -%}\n    {%- set loop_messages = messages -%}\n{%- endif "
        "-%}\n{%- for message in loop_messages -%}\n    {%- if (message['role'] == 'user') "
        "!= (loop.index0 % 2 == 0) -%}\n        {{ raise_exception(\"Conversation roles must "
        "alternate user/assistant/user/assistant/...\") }}\n    {%- endif -%}\n    {%- if "
        "(message['role'] == 'assistant') -%}\n        {%- set role = \"model\" -%}\n    {%- "
        "else -%}\n        {%- set role = message['role'] -%}\n    {%- endif -%}\n    {{ "
        "'<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}\n  "
        "  {%- if message['content'] is string -%}\n        {{ message['content'] | trim "
        "}}\n    {%- elif message['content'] is iterable -%}\n        {%- for item in "
        "message['content'] -%}\n            {%- if item['type'] == 'image' -%}\n            "
        "    {{ '<start_of_image>' }}\n            {%- elif item['type'] == 'text' -%}\n     "
        "           {{ item['text'] | trim }}\n            {%- endif -%}\n        {%- endfor "
        "-%}\n    {%- else -%}\n        {{ raise_exception(\"Invalid content type\") }}\n    "
        "{%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n{%- if "
        "add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}\n",
        "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>",), "<end_of_turn>",
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + "
        "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' "
        "%}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == "
        "'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% "
        "endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ "
        "eos_token }}{% endif %}",
        "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>",), "<|end|>",
    ),
    "ibm-granite/granite-3.0-8b-instruct": (
        "{%- if tools %}\n    {{- '<|start_of_role|>available_tools<|end_of_role|>\n' }}\n   "
        " {%- for tool in tools %}\n    {{- tool | tojson(indent=4) }}\n    {%- if not "
        "loop.last %}\n        {{- '\n\n' }}\n    {%- endif %}\n    {%- endfor %}\n    {{- "
        "'<|end_of_text|>\n' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if "
        "message['role'] == 'system' %}\n    {{- '<|start_of_role|>system<|end_of_role|>' + "
        "message['content'] + '<|end_of_text|>\n' }}\n    {%- elif message['role'] == 'user' "
        "%}\n    {{- '<|start_of_role|>user<|end_of_role|>' + message['content'] + "
        "'<|end_of_text|>\n' }}\n    {%- elif message['role'] == 'assistant' %}\n    {{- "
        "'<|start_of_role|>assistant<|end_of_role|>'  + message['content'] + "
        "'<|end_of_text|>\n' }}\n    {%- elif message['role'] == 'assistant_tool_call' %}\n  "
        "  {{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' + message['content'] "
        "+ '<|end_of_text|>\n' }}\n    {%- elif message['role'] == 'tool_response' %}\n    "
        "{{- '<|start_of_role|>tool_response<|end_of_role|>' + message['content'] + "
        "'<|end_of_text|>\n' }}\n    {%- endif %}\n    {%- if loop.last and "
        "add_generation_prompt %}\n    {{- '<|start_of_role|>assistant<|end_of_role|>' }}\n  "
        "  {%- endif %}\n{%- endfor %}",
        "<|end_of_text|>", "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>",), "<|end_of_text|>",
    ),
}  # fmt: skip
