"""Questions from Hugging Face `datasets`: saved data sets, JSON, CSV and Parquet files, or objects of your own.

    data = "squad-small"                         a folder written by `save_to_disk`
    data = "questions.csv"                       a file: .json, .jsonl, .csv, .parquet
    data = "my_module:my_dataset"                a Dataset or DatasetDict, or a function that makes one

    a record -> `columns` and `template` -> a row as in `jsonl` -> checked, split and played as there

Which column is the prompt, the answer and the choices is a mapping; answers that are numbers or letters of a choice
are looked up among the choices. Nothing is skipped: all records are checked when the scenario is built, and bad ones
are listed with their number. Nothing is downloaded: what is on the hub is fetched and saved beforehand.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from coterie.config import explain
from coterie.errors import ConfigError, ScenarioError, nearest
from coterie.scenarios.adapters.foreign import Sandbox, attribute, load
from coterie.scenarios.jsonl import RowOptions, Rows
from coterie.scenarios.jsonl_rows import Located, Problems, Row

_READERS: Final = {".json": "from_json", ".jsonl": "from_json", ".csv": "from_csv", ".parquet": "from_parquet"}
_FIELDS: Final = tuple(Row.model_fields)


class DatasetsOptions(RowOptions):
    """Settings of a data set."""

    data: str
    """A folder written by save_to_disk, a .json, .jsonl, .csv or .parquet file, or "module:attr"."""
    split: str = "train"
    """Of a data set with several splits: the one to train on."""
    heldout_split: str | None = None
    """Of a data set with several splits: the one held out; None: a share of `split`, or `heldout_data`."""
    heldout_data: str | None = None
    """Where the held-out records are, like `data`; None: `heldout_split`, or a share of the training records."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What a row needs = the column that has it, for example answer = "label"; what is not named is taken from the
    column of the same name, where there is one."""
    template: str | None = None
    """Makes the prompt of several columns, for example "{passage}\\n{question}"; None: the prompt column alone."""
    choices: tuple[str, ...] | None = None
    """The same choices for every record; None: the choices column, the names of a class label, or none."""
    answer_is: Literal["text", "index", "label"] = "text"
    """What the answer column has. text: the answer itself. index: its place among the choices, from 0. label: its name
    in the choices column's "label" list, or its letter (A is the first choice)."""
    limit: int | None = Field(default=None, ge=1)
    """Most records taken of each side, from the beginning; None: all."""

    @model_validator(mode="after")
    def _fits(self) -> DatasetsOptions:
        unknown = sorted(set(self.columns) - set(_FIELDS))
        if unknown:
            raise ValueError(f"columns names {unknown[0]!r}, which no row has{nearest(unknown[0], _FIELDS)}")
        if self.heldout_split is not None and self.heldout_data is not None:
            raise ValueError("give either heldout_split or heldout_data, not both")
        if self.held_apart and "heldout_share" in self.model_fields_set:
            raise ValueError("give either held-out records of their own or heldout_share, not both")
        if self.template is not None:
            if "prompt" in self.columns:
                raise ValueError("give either template or columns.prompt, not both")
            _template_columns(self.template)
        return self

    @property
    def held_apart(self) -> bool:
        """Whether held-out records have a source of their own."""
        return self.heldout_split is not None or self.heldout_data is not None


class Datasets(Rows):
    """Questions from a data set: every seat answers, and seats that may speak give advice first.

    Raises:
        ConfigError: the extra is missing, the data cannot be read or has no such split or column, records are bad (all
            are listed), or one side of the split is empty.
    """

    Options = DatasetsOptions

    def __init__(self, options: DatasetsOptions, data: Any = None, heldout: Any = None) -> None:
        """
        Args:
            data: a Dataset or DatasetDict in memory, instead of what `options.data` names; that then only names it.
            heldout: the held-out records in memory.
        """
        self.options = options
        found = _open(options.data) if data is None else data
        records = _side(found, options.split, options.data)
        others = heldout
        if others is None and options.heldout_data is not None:
            others = _side(_open(options.heldout_data), options.split, options.heldout_data)
        elif others is None and options.heldout_split is not None:
            others = _side(found, options.heldout_split, options.data, named=True)
        problems = Problems()
        rows = _rows(records, options, options.data, problems)
        apart = None if others is None else _rows(others, options, options.heldout_data or options.data, problems)
        super().__init__(options, problems, rows, apart, "record")


def _package() -> Any:
    return load("datasets", extra="datasets", scenario="datasets")


def _open(data: str) -> Any:
    """What `data` names. Raises `ConfigError`."""
    package = _package()
    path = Path(data)
    if not path.exists():
        if ":" in data and "://" not in data:
            found = attribute("data set", data)
            return found() if callable(found) else found
        raise ConfigError(
            f"data {data!r}: there is no such file or folder; give a folder written by save_to_disk, a "
            f'{", ".join(_READERS)} file, or "module:attr". Data sets of the hub are fetched and saved beforehand: '
            "datasets.load_dataset(name).save_to_disk(folder)"
        )
    if path.is_dir():
        return _read(data, lambda: package.load_from_disk(data))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"data {data!r}: {path.suffix or 'a file without ending'} is none of {', '.join(_READERS)}")
    with tempfile.TemporaryDirectory() as cache:
        # what is read stays in memory; the package's own cache would keep every version of the file
        return _read(data, lambda: getattr(package.Dataset, reader)(data, cache_dir=cache, keep_in_memory=True))


def _read(data: str, reading: Callable[[], Any]) -> Any:
    package = _package()
    shown = not package.are_progress_bars_disabled()
    package.disable_progress_bars()
    try:
        with Sandbox(0).running(data):
            return reading()
    except ScenarioError as error:
        raise ConfigError(f"data {data!r} cannot be read: {error.__cause__}") from error
    finally:
        if shown:
            package.enable_progress_bars()


def _side(found: Any, split: str, name: str, *, named: bool = False) -> Any:
    """One split of what was opened. Raises `ConfigError` when there is no such split, or it is no data set.

    Args:
        named: whether the split was asked for by name, and must be one.
    """
    package = _package()
    if isinstance(found, package.DatasetDict):
        if split not in found:
            raise ConfigError(f"data {name!r} has no split {split!r}{nearest(split, found)}")
        return found[split]
    if not isinstance(found, package.Dataset):
        raise ConfigError(f"data {name!r} is a {type(found).__name__}, not a Dataset or DatasetDict")
    if named:
        raise ConfigError(f"data {name!r} has no splits, so heldout_split {split!r} cannot be taken; give heldout_data")
    return found


def _rows(records: Any, options: DatasetsOptions, source: str, problems: Problems) -> list[Located]:
    """The good rows; bad records go to `problems`. Raises `ConfigError` for missing columns, or no records."""
    columns = {field: options.columns.get(field, field) for field in _FIELDS}
    if options.template is not None:
        del columns["prompt"]
    needed = [*options.columns.values(), *(_template_columns(options.template) if options.template else ())]
    needed += [] if options.template else [columns["prompt"]]
    for column in [*needed, columns["answer"]]:
        if column not in records.column_names:
            raise ConfigError(
                f"data {source!r} has no column {column!r}{nearest(column, records.column_names)}; say in "
                "scenario.options.columns which column is the prompt and which the answer"
            )
    if len(records) == 0:
        raise ConfigError(f"data {source!r} has no records")
    used = {field: column for field, column in columns.items() if column in records.column_names}
    names = _class_names(records, used["answer"])
    found = []
    for number in range(min(len(records), options.limit or len(records))):
        record = records[number]
        try:
            row = Row.model_validate(_row(record, used, names, options))
        except ValidationError as error:
            problems.add(f"{source}:{number}", explain(error, Row).replace("(top level): ", ""))
        except ValueError as error:
            problems.add(f"{source}:{number}", str(error))
        else:
            found.append(Located(source, number, row))
    return found


def _row(
    record: Mapping[str, Any], used: Mapping[str, str], names: Sequence[str] | None, options: DatasetsOptions
) -> dict[str, Any]:
    """A record as `Row` has it. Raises `ValueError` saying what is wrong with it."""
    # a column that is empty in this record is as good as none
    row = {field: record[column] for field, column in used.items() if record[column] is not None}
    if options.template is not None:
        row["prompt"] = options.template.format_map(
            {key: _text(record[key]) for key in _template_columns(options.template)}
        )
    given: Any = row.pop("choices", None)
    labels = None
    if isinstance(given, Mapping):  # {"text": [...], "label": [...]}
        labels, given = given.get("label"), given.get("text")
    choices = options.choices
    if choices is None and given is not None:
        choices = tuple(_text(choice).strip() for choice in given)
    if choices is None and names is not None:
        choices = tuple(names)
    if "answer" not in row:
        raise ValueError(f"column {used['answer']!r} is empty")
    row["answer"] = _answer(row["answer"], choices, labels, names, options.answer_is)
    if "prompt" in row:
        row["prompt"] = _text(row["prompt"])
    if choices is not None:
        row["choices"] = choices
    return row


def _answer(
    value: Any, choices: Sequence[str] | None, labels: Sequence[Any] | None, names: Sequence[str] | None, kind: str
) -> str:
    """The answer as text. Raises `ValueError` when it points at no choice."""
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if kind == "text":
        if names is not None and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return _text(value).strip()
    if choices is None:
        raise ValueError(f"answer_is {kind!r} needs choices")
    place: int | None = None
    if kind == "index" and isinstance(value, int | str) and str(value).strip().isdecimal():
        place = int(value)
    elif kind == "label":
        letters = [_text(label) for label in labels] if labels else list(string.ascii_uppercase[: len(choices)])
        label = _text(value).strip()
        place = letters.index(label) if label in letters else None
    if place is None or place >= len(choices):
        raise ValueError(f"answer {value!r} is no {kind} of the {len(choices)} choices")
    return choices[place]


def _class_names(records: Any, column: str) -> list[str] | None:
    """The names of a class label column; None where it is something else."""
    feature = records.features[column]
    return list(feature.names) if isinstance(feature, _package().ClassLabel) else None


def _text(value: Any) -> str:
    """Text as it is; numbers as they are written. Raises `ValueError` for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"{value!r} is no text")


def _template_columns(template: str) -> list[str]:
    """Names in a template's braces. Raises `ValueError` for anything but plain names there."""
    try:
        parts = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}") from error
    odd = [name for name in parts if not name or any(sign in name for sign in ".[!:")]
    if odd or not parts:
        raise ValueError(f"template {template!r} must name columns in braces, and nothing but their names")
    return parts
