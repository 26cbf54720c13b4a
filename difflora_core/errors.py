"""Errors that DiffLoRA raises on purpose: one readable sentence each (what, where, what to do)."""


class DiffLoRAError(Exception):
    """Parent of every error that the library raises on purpose."""


class LayoutError(DiffLoRAError):
    """A LoRA does not have the layers, shapes or rank that the base model or network expects."""


class CheckpointError(DiffLoRAError):
    """A model checkpoint is missing, damaged, or made for something else."""


class ConfigError(DiffLoRAError):
    """A setting is outside its range or unknown."""


class NoFaceError(DiffLoRAError):
    """No usable face was found in the reference images."""


class ImageError(DiffLoRAError):
    """A reference image cannot be used (shape, size, or values)."""


class LoRAFileError(DiffLoRAError):
    """A LoRA file or state dict cannot be read or written."""


class LibraryError(DiffLoRAError):
    """An identity library cannot be read or changed, or does not hold what is asked for."""


class EncoderError(DiffLoRAError):
    """A face or image encoder is missing, incomplete, or of the wrong kind."""


class InterruptedTraining(DiffLoRAError):
    """Training was stopped on request; the last complete checkpoint can be resumed."""
