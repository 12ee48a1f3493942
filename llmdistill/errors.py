"""Exceptions that llmdistill raises on purpose.

    LlmDistillError
    ├── RecipeError      (ValueError)    a recipe, an override or an option is wrong
    ├── ModelError       (ValueError)    a model cannot be loaded, split or carved
    │   └── VocabularyError              teacher and student do not share one vocabulary
    ├── DataError        (ValueError)    a data file or row cannot be used
    ├── TrainingError    (RuntimeError)  a training step is impossible
    │   ├── NonFiniteLossError           a loss or a gradient is NaN or infinite
    │   └── OutOfMemoryError             the memory does not suffice for a step
    ├── TeacherError     (RuntimeError)  a remote teacher gives no usable reply
    ├── CheckpointError  (RuntimeError)  a run folder or a checkpoint cannot be used
    ├── HubError         (RuntimeError)  the Hub refuses an upload, or cannot be reached
    └── StoppedError     (RuntimeError)  a signal ended the run, which has saved a checkpoint

Each message says what is wrong, where, what value was got, and what to do.  Each class also derives
from the built-in exception in brackets, for callers that do not know this package.
"""


class LlmDistillError(Exception):
    """Base class of all errors that llmdistill raises on purpose."""


class RecipeError(LlmDistillError, ValueError):
    """A recipe, an override or a command-line option is wrong."""


class ModelError(LlmDistillError, ValueError):
    """A model cannot be loaded, split into backbone and head, or carved."""


class VocabularyError(ModelError):
    """Teacher and student do not share one vocabulary, so their logits cannot be compared."""


class DataError(LlmDistillError, ValueError):
    """A data file or one of its rows cannot be used."""


class TrainingError(LlmDistillError, RuntimeError):
    """A training step is impossible with these models or settings."""


class NonFiniteLossError(TrainingError):
    """A loss or a gradient norm is NaN or infinite.  The weights were not updated."""


class OutOfMemoryError(TrainingError):
    """The memory of a device does not suffice for a step.  The message says what to lower."""


class TeacherError(LlmDistillError, RuntimeError):
    """A remote teacher refuses a request or gives no usable reply."""


class CheckpointError(LlmDistillError, RuntimeError):
    """A run folder or a checkpoint cannot be used."""


class HubError(LlmDistillError, RuntimeError):
    """A folder cannot be uploaded: it is not complete, or the Hub refuses it or is out of reach."""


class StoppedError(LlmDistillError, RuntimeError):
    """SIGTERM ended training after a step, and a checkpoint was saved."""
