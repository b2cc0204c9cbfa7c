"""Data sets of a configuration: files or names on the Hub, with their columns, as `data`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import SettingsError
from afina.importing.conversion import Conversion
from afina.importing.read_config import read_json

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".arrow", ".gz")
FORMATS = ("json", "csv", "parquet", "text")  # names of formats in place of a data set's
ROW_KINDS = (  # of Axolotl, whose rows are found by their columns
    "None",
    "alpaca",
    "chat_template",
    "chatml",
    "completion",
    "llama3",
    "pretrain",
    "prompt_pairs",
    "sharegpt",
    "user_defined",
)
HUB_SET = re.compile(r"hf:[^\[\]]+")  # without a split
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def data_set(name: str, config: str | None = None, split: str | None = None) -> str:
    """Return a file or folder as it is, and anything else as a data set of the Hub."""
    is_file = name.endswith(FILE_SUFFIXES) or name.startswith((".", "/", "~", "hf:"))
    if is_file or Path(name).exists() or not HUB_NAME.fullmatch(name):
        return name
    parts = f":{config}" if config else ""
    return f"hf:{name}{parts}" + (f"[{split}]" if split and split != "train" else "")


def set_data(c: Conversion, name: str, files: list[dict[str, Any]]) -> None:
    """Set `data` to one file, with `columns`, or to several."""
    if len(files) == 1 and "weight" not in files[0]:
        columns = files[0].get("columns")
        c.use(name, {"data": files[0]["path"], **({"columns": columns} if columns else {})})
    elif files:
        c.use(name, {"data": files})
    else:
        c.missing(name, "it names no file of rows")


def trl_data(c: Conversion) -> None:
    """Read dataset_name, or the mixture `datasets` of TRL's scripts."""
    text = c.get("text_column", "text")
    columns = {} if text == "text" else {"columns": {"text": text}}
    if columns:
        c.use("text_column", {"columns": columns["columns"]})
    else:
        c.comment("text_column", "columns are found by their names")
    if name := c.get("dataset"):
        path = data_set(str(name), c.get("dataset_config"), c.get("split"))
        set_data(c, "dataset", [{"path": path, **columns}])
        for part in ("dataset_config", "split"):
            if c.get(part) is not None:
                c.use(part, {"data": path})
        return
    files = []
    for number, one in enumerate(_list(c.get("datasets"))):
        path = one.get("path") or ""
        if one.get("data_files"):
            path = str(_list_of_names(one["data_files"])[0])
        files.append({"path": data_set(path, one.get("name"), one.get("split"))})
        for key in one.keys() - {"path", "name", "split", "data_files", "columns"}:
            c.part_missing(f"datasets.{number}.{key}", one[key])
    set_data(c, "datasets", files)


def axolotl_data(c: Conversion) -> bool:
    """Read `datasets` of Axolotl; return whether all of them are plain texts."""
    files, kinds = [], set()
    name = "pretraining_dataset" if c.get("pretraining_dataset") else "datasets"
    for number, one in enumerate(_list(c.get(name))):
        files += _axolotl_files(c, f"{name}.{number}", one)
        default = "completion" if name == "pretraining_dataset" else None
        kinds.add(str(default or one.get("type")).partition(":")[0].partition(".")[0])
    set_data(c, name, files)
    tests: list[dict[str, Any]] = []
    for number, one in enumerate(_list(c.get("test_datasets"))):
        tests += _axolotl_files(c, f"test_datasets.{number}", one)
    if len(tests) == 1:
        c.use("test_datasets", {"eval_data": tests[0]["path"]})
        c.settings.pop("eval_size", None)
    return kinds == {"completion"}


def _axolotl_files(c: Conversion, where: str, one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one data set of Axolotl: its files, and the names of their columns."""
    names, path = _list_of_names(one.get("data_files")), str(one.get("path", ""))
    if names and path not in FORMATS and not Path(path).is_dir():
        c.part_missing(f"{where}.data_files", names, "files of a data set of the Hub")
        names = []
    folder = Path("" if path in FORMATS else path)
    paths = [str(folder / name) for name in names]
    paths = paths or [data_set(path, one.get("name"), one.get("split"))]
    columns: dict[str, Any] = {}
    kind = one.get("type")
    if not isinstance(kind, Mapping) and re.split(r"[.:]", str(kind))[0] not in ROW_KINDS:
        c.part_missing(f"{where}.type", kind, "prompts of this kind")
    if isinstance(kind, Mapping):
        columns = _own_columns(c, f"{where}.type", kind)
    elif kind == "completion" and one.get("field", "text") != "text":
        columns = {"text": one["field"]}
    if one.get("field_messages") not in (None, "messages"):
        columns["messages"] = one["field_messages"]
    known = {"path", "name", "split", "data_files", "type", "ds_type", "field", "field_messages"}
    neutral: dict[str, list[Any]] = {
        "roles_to_train": [["assistant"], ["gpt"], ["assistant", "gpt"], ["gpt", "assistant"]],
        "train_on_eos": ["turn"],
        "chat_template": ["tokenizer_default"],
        "message_field_role": ["role", "from"],
        "message_field_content": ["content", "value"],
        "conversation": ["chatml"],
        "trust_remote_code": [False],
        "train_on_split": ["train"],
        "message_property_mappings": [
            {"role": "role", "content": "content"},
            {"role": "from", "content": "value"},
        ],
        "roles": [
            {"user": ["human", "user"], "assistant": ["gpt", "assistant"]},
            {"assistant": ["gpt", "assistant"], "user": ["human", "user"]},
        ],
    }
    for key, value in one.items():
        if key in known:
            continue
        if value in (None, "", [], {}) or value in neutral.get(key, []):
            c.part_comment(f"{where}.{key}", value)
        else:
            c.part_missing(f"{where}.{key}", value)
    return [{"path": path, **({"columns": columns} if columns else {})} for path in paths]


def _own_columns(c: Conversion, where: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a format that the file describes itself: field_instruction, format."""
    instruction = kind.get("field_instruction", "instruction")
    form = kind.get("format") or "{instruction}"
    fields = {"instruction": instruction, "input": kind.get("field_input", "input")}
    for name, field in fields.items():
        form = form.replace("{" + name + "}", "{" + field + "}")
    columns = {
        "prompt": instruction if form == "{" + instruction + "}" else form,
        "completion": kind.get("field_output", "output"),
    }
    if system := kind.get("field_system"):
        columns["system"] = system
    for key in ("system_prompt", "system_format", "no_input_format"):
        if kind.get(key) not in (None, "", "{system}", "{instruction}", kind.get("format")):
            c.part_missing(f"{where}.{key}", kind[key])
    return columns


def llama_factory_data(c: Conversion, config_folder: Path) -> None:
    """Read `dataset` of LLaMA-Factory: names of dataset_info.json."""
    info, folder = _dataset_info(c, config_folder)
    weights = _list_of_names(c.get("interleave_probs"))
    names = _list_of_names(c.get("dataset"))
    files = [_llama_factory_file(c, name, info, folder) for name in names]
    if weights:
        c.use("interleave_probs", {})
        for one, weight in zip(files, weights, strict=False):
            one["weight"] = float(weight)
    if str(c.get("mix_strategy", "concat")).startswith(("concat", "interleave")):
        c.comment("mix_strategy")
    _limit(c, files)
    set_data(c, "dataset", files)
    if evaluated := _list_of_names(c.get("eval_dataset")):
        path = _llama_factory_file(c, evaluated[0], info, folder)["path"]
        c.use("eval_dataset", {"eval_data": path})
        c.settings.pop("eval_size", None)
    c.comment("dataset_dir", "paths of data name it")


def _limit(c: Conversion, files: list[dict[str, Any]]) -> None:
    """Read max_samples: data sets of the Hub have a split with so many rows."""
    limit = c.get("max_samples")
    if limit is None:
        return
    if all(HUB_SET.fullmatch(one["path"]) for one in files):
        for one in files:
            one["path"] += f"[train[:{limit}]]"
        c.use("max_samples", {}, shown=("data",))
    else:
        c.missing("max_samples", "a file with fewer rows")


def _dataset_info(c: Conversion, config_folder: Path) -> tuple[dict[str, Any], Path]:
    given = Path(str(c.get("dataset_dir", "data")))
    for folder in (given, config_folder / given, config_folder):
        file = folder / "dataset_info.json"
        if file.is_file():
            return read_json(file), folder
    return {}, given


def _llama_factory_file(
    c: Conversion, name: str, info: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return one data set; without its description, a file of that name is assumed."""
    one = info.get(name)
    if one is None:
        if info:
            known = ", ".join(list(info)[:8])
            what = f"the data set {name!r} is not in dataset_info.json"
            raise SettingsError(what, where=str(folder), hint=f"known: {known}")
        return {"path": str(folder / f"{name}.json")}
    hub = one.get("hf_hub_url")
    path = data_set(hub, one.get("subset"), one.get("split")) if hub else ""
    path = path or str(folder / one.get("file_name", f"{name}.json"))
    columns = _llama_factory_columns(one)
    for key in one.keys() - {"file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns"}:
        if key not in ("ranking", "tags", "subset", "split", "folder") and one[key]:
            c.part_missing(f"dataset.{name}.{key}", one[key])
    return {"path": path, **({"columns": columns} if columns else {})}


def _llama_factory_columns(one: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in (one.get("columns") or {}).items() if value}
    if one.get("formatting") == "sharegpt":
        messages = given.get("messages", "conversations")
        names = {"messages": messages, "chosen": "chosen", "rejected": "rejected"}
        return {
            key: given.get(key, default)
            for key, default in names.items()
            if given.get(key) not in (None, default) or (key == "messages" and key in given)
        }
    names = {"response": "completion", "system": "system", "chosen": "chosen"}
    names |= {"rejected": "rejected"}
    columns: dict[str, Any] = {names[key]: given[key] for key in names if key in given}
    prompt = [given[key] for key in ("prompt", "query") if key in given]
    if prompt:
        columns["prompt"] = prompt[0] if len(prompt) == 1 else prompt
    return columns


def mlx_data(c: Conversion) -> None:
    """Read the folder of train.jsonl and valid.jsonl, or `hf_dataset`, of mlx-lm."""
    found = c.get("hf_dataset")
    for number, one in enumerate(_list(found)):
        columns = {
            name: one[key]
            for name, key in (
                ("prompt", "prompt_feature"),
                ("completion", "completion_feature"),
                ("text", "text_feature"),
                ("messages", "chat_feature"),
                ("system", "system_feature"),
            )
            if key in one
        }
        name = one.get("path") or one.get("name") or ""
        path = data_set(name, None, one.get("train_split"))
        columns_of = {"columns": columns} if columns else {}
        set_data(c, "hf_dataset", [{"path": path, **columns_of}])
        for key in one.keys() & {"chosen_feature", "rejected_feature", "preference_score_feature"}:
            c.part_missing(f"hf_dataset.{number}.{key}", one[key])
        for key in one.keys() & {"config", "valid_split", "test_split"}:
            c.part_comment(f"hf_dataset.{number}.{key}", one[key], "eval rows are held out")
    if not found and (folder := c.get("data_folder")):
        path = data_set(str(folder))
        if path.startswith("hf:"):
            set_data(c, "data_folder", [{"path": path}])
            return
        valid = Path(str(folder)) / "valid.jsonl"
        has_valid = valid.exists() or not valid.parent.exists()
        evaluated = {"eval_data": str(valid)} if has_valid else {}
        c.use("data_folder", {"data": str(Path(str(folder)) / "train.jsonl"), **evaluated})


def _list(value: Any) -> list[Mapping[str, Any]]:
    """Return a mapping or several of them as a list."""
    many = [value] if isinstance(value, Mapping | str) else value or []
    return [one if isinstance(one, Mapping) else {"path": str(one)} for one in many]


def _list_of_names(value: Any) -> list[str]:
    """Return names that may be written with commas."""
    many = value.split(",") if isinstance(value, str) else value
    return [str(one).strip() for one in many or []] if not isinstance(many, float) else [str(many)]
