"""All model families; a new one is added here."""

from ttq_jax.models import (
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from ttq_jax.models.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, phi3, smollm3, olmo2,
        olmoe, granite, opt,
    )
}  # fmt: skip
