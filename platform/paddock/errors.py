"""The mistakes a user can fix.

    PaddockError           exit code 2, one line: what, where, what was found, what to do next
    ├── ConfigError        a key, a value, a combination of keys
    ├── DataError          a data file: `FILE:LINE: ...`
    ├── ModelError         a base model, an adapter or a checkpoint
    │   └── UnknownAdapterError   none of that name
    ├── OutputError        an output directory: made by another config, in use, damaged
    ├── StorageError       a URI that cannot be read or written
    ├── ResourceError      the cluster cannot give what the run asks for
    └── ServiceError       a served model that does not come up or does not answer

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class PaddockError(Exception):
    """A mistake the user can fix; its text is the one line that they read."""

    exit_code = 2


class ConfigError(PaddockError):
    """A configuration key, value or combination is wrong."""


class DataError(PaddockError):
    """A data file cannot be used."""


class ModelError(PaddockError):
    """A model, adapter or checkpoint directory cannot be used."""


class UnknownAdapterError(ModelError):
    """There is no adapter of that name."""


class OutputError(PaddockError):
    """An output directory cannot be written or trusted."""


class StorageError(PaddockError):
    """A URI cannot be read or written."""


class ResourceError(PaddockError):
    """The cluster has not, and cannot grow to, what the run asks for."""


class ServiceError(PaddockError):
    """A served model does not come up, or stops answering."""
