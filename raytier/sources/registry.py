"""The models that an application knows: those of its configuration, or of a file of their own (spec E3).

    models:
    - model_id: llama-8b
      source_type: huggingface          # or local, or what a loader was registered for
      source_path: meta-llama/Llama-3.1-8B-Instruct
      model_format: safetensors

These four fields are required in a file; `ModelEntry` has the others.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from raytier.config import AppConfig
from raytier.errors import ConfigurationError, ModelNotFoundError
from raytier.model_entry import REQUIRED_FIELDS, ModelEntry
from raytier.problems import explain
from raytier.sources.local import local_directory

#: A catalogue of thousands of models is far below that.
_MAX_BYTES = 16 * 2**20


class Registry:
    """The entries by id, in their order. Safe from any thread.

    Invariant: what was persisted is in the file, except for secrets of loaders, which are in memory only.

    Attributes:
        path: of the file; None when the models are part of the configuration.
        startup: id of the model that is loaded when the application starts, None: no model is.
    """

    def __init__(self, entries: Sequence[ModelEntry], path: str | None, startup: str | None = "auto") -> None:
        self.path = path
        self._entries = {entry.model_id: entry for entry in entries}
        self._lock = threading.Lock()
        if startup == "auto":
            startup = next(iter(self._entries), None)
        elif startup is not None and startup not in self._entries:
            raise ConfigurationError(f"startup_model: {startup!r} is not one of {', '.join(self._entries) or 'none'}")
        self.startup = startup

    @classmethod
    def of(cls, config: AppConfig) -> Registry:
        """The registry of an application.

        Raises:
            ConfigurationError: the file cannot be read, or an entry of it is wrong: names file, entry and field.
        """
        entries = config.models if config.registry is None else read_models(config.registry)
        return cls(entries, config.registry, config.startup_model)

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        with self._lock:
            return tuple(self._entries.values())

    @property
    def ids(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def get(self, model_id: str) -> ModelEntry:
        """The entry of that id; ModelNotFoundError names the known ones."""
        with self._lock:
            if (entry := self._entries.get(model_id)) is not None:
                return entry
            known = ", ".join(self._entries) or "none"
        raise ModelNotFoundError(f"model {model_id!r} is not served here; served are: {known}")

    def resolve(self, name: str | None) -> str:
        """Id of the model that a user means by an id, a path, or None: the startup model, or the only one.

        Raises:
            ModelNotFoundError: names the known ones.
        """
        entries = self.entries
        if name is None:
            if self.startup is not None:
                return self.startup
            if len(entries) == 1:
                return entries[0].model_id
            raise ModelNotFoundError(f"say which model is meant; served are: {', '.join(self.ids) or 'none'}")
        if any(entry.model_id == name for entry in entries):
            return name
        for entry in entries:
            if name == entry.source_path or (entry.source_type == "local" and name == local_directory(entry)):
                return entry.model_id
        return self.get(name).model_id

    def put(self, entry: ModelEntry, *, persist: bool) -> bool:
        """Add a model, or replace what is known of it; False when that was the same already.

        Args:
            persist: write it to the file, in place: comments and the order of entries stay.

        Raises:
            ConfigurationError: there is no file to write to, or it cannot be written, or is not valid any more.
        """
        with self._lock:
            if persist:
                if self.path is None:
                    raise ConfigurationError(
                        f"{entry.model_id}: nowhere to keep it: this application has its models in its configuration; "
                        "name a file in `registry`, or register without persist"
                    )
                written = _write_entry(self.path, entry)
            else:
                written = False
            changed = written or self._entries.get(entry.model_id) != entry
            self._entries[entry.model_id] = entry
            return changed


def parse_entry(fields: Mapping[str, Any], where: str = "model", *, all_required: bool = False) -> ModelEntry:
    """A `ModelEntry` of plain data.

    Args:
        where: what errors begin with.
        all_required: as in a file: nothing is taken for granted that says where the model comes from.

    Raises:
        ConfigurationError: a line for each field that is wrong.
    """
    problems = [f"{name}: required, not given" for name in REQUIRED_FIELDS if all_required and name not in fields]
    try:
        entry = ModelEntry.model_validate(dict(fields))
    except ValidationError as error:
        problems += [line for line in explain(error, ModelEntry) if line not in problems]
    if problems:
        raise ConfigurationError("\n  ".join(f"{where}: {problem}" for problem in problems))
    return entry


def read_models(path: str) -> list[ModelEntry]:
    """The entries of a registry file, in their order.

    Raises:
        ConfigurationError: it cannot be read; or a line per problem, with file, entry and field.
    """
    content = _load(path)
    entries: list[ModelEntry] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, fields in enumerate(_items(path, content)):
        where = f"{path}: models[{number}]"
        if not isinstance(fields, Mapping):
            problems.append(f"{where}: a mapping of fields is needed, found {fields!r}")
            continue
        if isinstance(fields.get("model_id"), str):
            where += f" ({fields['model_id']})"
        try:
            entry = parse_entry(_plain(fields), where, all_required=True)
        except ConfigurationError as error:
            problems.append(error.message)
            continue
        if entry.model_id in first:
            problems.append(f"{where}: model_id: models[{first[entry.model_id]}] has it already")
        first.setdefault(entry.model_id, number)
        entries.append(entry)
    if problems:
        raise ConfigurationError("The registry of models is not valid:\n  " + "\n  ".join(problems))
    return entries


def _yaml() -> YAML:
    yaml = YAML()  # round trip: keeps comments and order, makes no objects of tags
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def _load(path: str) -> CommentedMap:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{path}: the registry of models cannot be read: {reason}") from None
    if len(text) > _MAX_BYTES:
        raise ConfigurationError(f"{path}: more than {_MAX_BYTES} characters; this is no registry of models")
    try:
        content = _yaml().load(text)
    except (YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not valid YAML: {' '.join(str(error).split())[:500]}") from None
    if content is None:
        content = CommentedMap()
    if not isinstance(content, CommentedMap) or (extra := [key for key in content if key != "models"]):
        found = "no mapping" if not isinstance(content, CommentedMap) else f"unknown keys {', '.join(map(str, extra))}"
        raise ConfigurationError(f"{path}: the one key `models` is needed, a list of models; found {found}")
    return content


def _items(path: str, content: CommentedMap) -> list[Any]:
    models = content.get("models")
    if models is None:
        return []
    if not isinstance(models, list):
        raise ConfigurationError(f"{path}: models: a list is needed, found {models!r}")
    return models


def _plain(value: Any) -> Any:
    """What ruamel read, as Python's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _write_entry(path: str, entry: ModelEntry) -> bool:
    """Put `entry` into the file; False when it says so already. What others have changed there meanwhile stays."""
    read_models(path)  # what is wrong there is not written anew
    content = _load(path)
    if content.get("models") is None:
        content["models"] = []
    fields = {name: getattr(entry, name) for name in REQUIRED_FIELDS} | entry.public()
    known = next((item for item in content["models"] if item.get("model_id") == entry.model_id), None)
    if known is not None and _plain(known) == fields:
        return False
    if known is None:
        content["models"].append(CommentedMap(fields))
    else:
        for name in [name for name in known if name not in fields]:
            del known[name]
        for name, value in fields.items():
            if name not in known or _plain(known[name]) != value:
                known[name] = value
    text = StringIO()
    _yaml().dump(content, text)
    _replace(path, text.getvalue())
    return True


def _replace(path: str, text: str) -> None:
    """Replace a file as a whole, or not at all, also when the machine fails in the midst of it."""
    target = os.path.realpath(path)
    temporary = ""
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=f".{os.path.basename(target)}.")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ConfigurationError(f"{path}: the registry of models cannot be written: {error.strerror}") from None
