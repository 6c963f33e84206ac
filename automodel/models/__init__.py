"""Native model families: one decoder written once, and for each family what is particular to it.

`NATIVE_MODELS` maps a config's `model_type` to the class that runs it. Families whose config class transformers 4.57
does not have are there with transformers 5 only.
"""

from __future__ import annotations

import transformers

from automodel.compat import TRANSFORMERS_5
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.deepseek_v3 import NeMoDeepseekV3ForCausalLM
from automodel.models.gpt_oss import NeMoGptOssForCausalLM
from automodel.models.llama import NeMoLlamaForCausalLM
from automodel.models.mixtral import NeMoMixtralForCausalLM
from automodel.models.qwen2 import NeMoQwen2ForCausalLM
from automodel.models.qwen3 import NeMoQwen3ForCausalLM
from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
from automodel.models.qwen3_next import NeMoQwen3NextForCausalLM

__all__ = [
    "NATIVE_MODELS",
    "NativeCausalLM",
    "NeMoDeepseekV3ForCausalLM",
    "NeMoGptOssForCausalLM",
    "NeMoLlamaForCausalLM",
    "NeMoMixtralForCausalLM",
    "NeMoQwen2ForCausalLM",
    "NeMoQwen3ForCausalLM",
    "NeMoQwen3MoeForCausalLM",
    "NeMoQwen3NextForCausalLM",
]

NATIVE_MODELS: dict[str, type[NativeCausalLM]] = {
    model.config_class.model_type: model
    for model in (
        NeMoQwen3MoeForCausalLM,
        NeMoQwen3NextForCausalLM,
        NeMoMixtralForCausalLM,
        NeMoDeepseekV3ForCausalLM,
        NeMoGptOssForCausalLM,
        NeMoQwen3ForCausalLM,
        NeMoQwen2ForCausalLM,
        NeMoLlamaForCausalLM,
    )
}

if TRANSFORMERS_5:
    from automodel.models.nemotron_h import NeMoNemotronHForCausalLM

    __all__ += ["NeMoNemotronHForCausalLM"]
    NATIVE_MODELS["nemotron_h"] = NeMoNemotronHForCausalLM
if hasattr(transformers, "Qwen3_5TextConfig"):
    from automodel.models.qwen3_5 import NeMoQwen35ForCausalLM, NeMoQwen35MoeForCausalLM

    for _model in (NeMoQwen35MoeForCausalLM, NeMoQwen35ForCausalLM):
        NATIVE_MODELS[_model.config_class.model_type] = _model
