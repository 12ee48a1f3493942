"""What llmdistill raises on purpose.

    LlmDistillError
    ├── RecipeError      (ValueError)    a recipe, an override or an option is wrong
    ├── ModelError       (ValueError)    a model cannot be loaded, split or carved
    │   └── VocabularyError              teacher and student do not share one vocabulary
    ├── DataError        (ValueError)    a data file or row cannot be used
    ├── TrainingError    (RuntimeError)  a step cannot be made
    │   └── NonFiniteLossError           a loss or a gradient is NaN or infinite
    ├── TeacherError     (RuntimeError)  a remote teacher does not answer
    └── CheckpointError  (RuntimeError)  a run folder or a checkpoint cannot be used

Each message says what went wrong, where, what was found and what to do.  The second base is the
built-in exception that a caller who does not know this package would catch.
"""


class LlmDistillError(Exception):
    """Base of all errors that llmdistill raises on purpose."""


class RecipeError(LlmDistillError, ValueError):
    """A recipe, an override or a command-line option is wrong."""


class ModelError(LlmDistillError, ValueError):
    """A model cannot be loaded, split into backbone and head, or carved."""


class VocabularyError(ModelError):
    """Teacher and student do not share one vocabulary."""


class DataError(LlmDistillError, ValueError):
    """A data file or one of its rows cannot be used."""


class TrainingError(LlmDistillError, RuntimeError):
    """A training step cannot be made."""


class NonFiniteLossError(TrainingError):
    """A loss or a gradient norm is NaN or infinite; the update was not made."""


class TeacherError(LlmDistillError, RuntimeError):
    """A remote teacher refuses a request, or gives no usable answer."""


class CheckpointError(LlmDistillError, RuntimeError):
    """A run folder or a checkpoint cannot be used."""
