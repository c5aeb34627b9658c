"""Captioners in transformers' Auto classes: imported when one of them meets a captioner, or by the package's names."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from clipcap.config import ClipCapConfig
from clipcap.model import ClipCapModel
from clipcap.processing import ClipCapProcessor

__all__ = ["ClipCapConfig", "ClipCapModel", "ClipCapProcessor"]

AutoConfig.register(ClipCapConfig.model_type, ClipCapConfig, exist_ok=True)
AutoModel.register(ClipCapConfig, ClipCapModel, exist_ok=True)
AutoModelForImageTextToText.register(ClipCapConfig, ClipCapModel, exist_ok=True)
AutoProcessor.register(ClipCapConfig, ClipCapProcessor, exist_ok=True)
