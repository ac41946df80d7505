"""The Liquid Foundation Model; importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model.configuration import LiquidConfig
from model.modeling import LiquidForCausalLM, LiquidModel

AutoConfig.register(LiquidConfig.model_type, LiquidConfig)
AutoModel.register(LiquidConfig, LiquidModel)
AutoModelForCausalLM.register(LiquidConfig, LiquidForCausalLM)

__all__ = ["LiquidConfig", "LiquidForCausalLM", "LiquidModel"]
