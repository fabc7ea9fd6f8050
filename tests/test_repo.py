"""The layout that everything else relies on."""

from __future__ import annotations

import ast
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from paddock.config import ServeConfig, TrainConfig, build, load

# What each module of the package may import from it: an arrow of the design, read backwards.
ALLOWED = {
    # leaves
    "errors": "",
    "storage": "errors",
    "config_parts": "errors",
    "config": "config_parts errors",
    "locks": "errors storage",
    "aside": "",
    "manifest": "errors locks aside storage",
    "cluster": "errors",
    # rows -> tokens -> a trained adapter
    "data": "errors storage",
    "prompts": "data errors storage",
    "packing": "data errors prompts",
    "lora": "config errors manifest storage",
    "checkpoint": "errors manifest storage",
    "journal": "errors storage",
    "loss": "attention packing",
    "gradients": "",
    "dataset": "config data errors lora manifest packing prompts storage",
    "train": "acceleration checkpoint cluster config errors feed gradients journal lora packing sharding storage"
    " validation",
    "trainer": "checkpoint cluster config dataset errors four_bit journal lora manifest prompts storage train"
    " validation",
    "validation": "checkpoint cluster config data dataset errors manifest scoring storage sweep",
    "train_plan": "config dataset lora loss storage trainer",
    "attention": "",
    "float8": "",
    "four_bit": "config errors",
    "sharding": "",
    "feed": "",
    "acceleration": "attention config errors float8 four_bit loss sharding",
    # base and adapters -> a model
    "weights": "errors aside",
    "meta_llama": "errors",
    "hub": "errors",
    "published": "",
    "models_of_2023": "weights",
    "shards": "errors aside weights",
    "shard_tasks": "cluster config_parts errors shards weights",
    "convert": "config errors manifest meta_llama published shard_tasks shards storage weights",
    "merge_operations": "errors weights",
    "merge_adapter": "errors manifest merge_operations models_of_2023 weights",
    "merge_plan": "errors manifest merge_adapter merge_operations shards weights",
    "proof": "merge_adapter merge_plan models_of_2023 weights",
    "merge": "config convert errors hub lora manifest merge_operations merge_plan models_of_2023 proof published"
    " shard_tasks shards storage weights",
    # a model -> answers
    "adapters": "errors manifest merge_adapter merge_operations weights",
    "usage": "",
    "engine": "adapters config data errors manifest prompts storage usage",
    "ports": "",
    "ingress": "ports",
    "service": "cluster config errors ingress manifest prompts",
    "ledger": "errors storage",
    "unmerged": "errors lora merge_adapter storage",
    "clients": "config data engine errors lora prompts",
    "feeder": "clients config data errors ledger",
    "predict": "clients cluster config data engine errors feeder ledger lora manifest prompts scoring service storage"
    " submission tasks unmerged",
    # answers -> scores, without a model
    "tasks": "",
    "resampling": "tasks",
    "lenient": "tasks",
    "scoring": "data errors lenient resampling tasks",
    "submission": "data errors scoring tasks",
    "charts": "",
    "baselines": "",
    "report": "baselines charts data resampling scoring tasks",
    "evaluation": "config data errors ledger manifest report resampling scoring storage tasks",
    "comparison": "config data errors evaluation manifest resampling scoring storage submission tasks",
    # many adapters -> the best
    "sweep": "charts clients cluster config data errors evaluation manifest merge predict report scoring storage"
    " submission unmerged",
    # everything in one run
    "demo": "config data manifest merge prompts storage",
    "pipeline": "cluster config data demo engine errors ledger manifest merge ports predict prompts report scoring"
    " service storage submission trainer",
    # measurements, which may look into everything
    "benchmark": "acceleration clients cluster config config_parts data demo engine errors feed ingress ledger"
    " lora manifest merge merge_plan packing ports predict prompts proof service shard_tasks shards"
    " storage train weights",
}
RAY_EDGES = set(
    "benchmark clients cluster dataset merge pipeline predict service shard_tasks train trainer validation".split()
)


def _files(root: Path, *folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]


def _imports(file: Path) -> set[str]:
    """The dotted names of all that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _package_modules(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(file) if name.startswith("paddock.")} - {"__version__"}


def test_platform_stays_the_standard_librarys(root: Path) -> None:
    assert not (root / "platform" / "__init__.py").exists()
    assert [p.name for p in (root / "platform").iterdir() if p.name != "__pycache__"] == ["paddock"]
    assert "paddock" not in (platform.__file__ or "")
    code = "import platform, ray; print(platform.system())"
    for arguments in (["-c", code], ["-m", "platform"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=root,
            env={"PYTHONPATH": "platform:."},
            capture_output=True,
            text=True,
            check=True,
        )
        assert platform.system() in done.stdout


def test_no_module_is_named_after_a_standard_one(root: Path) -> None:
    names = {file.stem for file in _files(root, "platform", "jobs", "deployments")} - {"__init__"}
    assert names.isdisjoint(sys.stdlib_module_names)


def test_no_file_passes_400_lines_and_none_is_called_utils(root: Path) -> None:
    for file in _files(root, "platform", "jobs", "deployments", "tests"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
        assert file.stem != "utils", file


def test_imports_point_the_way_the_design_draws_them(root: Path) -> None:
    package = root / "platform" / "paddock"
    for file in _files(root, "platform"):
        module = file.relative_to(package).parts[0].removesuffix(".py")
        if module != "__init__":
            beyond = _package_modules(file) - {module} - set(ALLOWED[module].split())
            assert not beyond, f"{file} imports {beyond}; if the design wants that, say so in ALLOWED"


def test_the_package_imports_neither_jobs_nor_deployments_and_they_not_each_other(root: Path) -> None:
    for folder, others in (
        ("platform", {"jobs", "deployments"}),
        ("jobs", {"deployments"}),
        ("deployments", {"jobs"}),
    ):
        for file in _files(root, folder):
            assert {name.split(".")[0] for name in _imports(file)}.isdisjoint(others), file


def test_one_place_knows_vllm(root: Path) -> None:
    """Beside it only benchmarks, which run vLLM itself as a peer."""
    knows = {
        (f.parent if f.parent.name == "engine" else f).name
        for f in _files(root, "platform", "jobs", "deployments")
        if "vllm" in {n.split(".")[0] for n in _imports(f)} and f.parent.name != "benchmark"
    }
    assert knows == {"engine"}


def test_who_asks_an_endpoint_or_builds_the_application_waits_for_no_model_library(root: Path) -> None:
    code = "import sys, deployments, paddock.feeder; print({'peft', 'transformers', 'vllm'} & sys.modules.keys())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": "platform:."}, stdout=subprocess.PIPE, check=True
    )
    assert found.stdout.split() == [b"set()"]


def test_ray_stays_at_the_edges(root: Path) -> None:
    package = root / "platform" / "paddock"
    for file in _files(root, "platform"):
        if "ray" in {name.split(".")[0] for name in _imports(file)}:
            assert file.relative_to(package).parts[0].removesuffix(".py") in RAY_EDGES, file


def test_weights_are_never_unpickled_and_text_never_evaluated(root: Path) -> None:
    for file in _files(root, "platform", "jobs", "deployments"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{file}:{node.lineno}"
            if name == "torch.load":
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{file}:{node.lineno}"


@pytest.mark.parametrize("name", ["demo.yaml", "llama-7b.yaml"])
def test_every_training_config_loads(root: Path, name: str) -> None:
    assert load(TrainConfig, root / "jobs" / "configs" / name).train.max_steps > 0


def test_every_config_is_named_in_a_test(root: Path) -> None:
    assert {file.name for file in (root / "jobs" / "configs").iterdir()} == {"demo.yaml", "llama-7b.yaml"}


def test_serve_yaml_loads_in_serves_own_schema(root: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load((root / "deployments" / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    for application in schema.applications:
        assert application.import_path == "deployments:app"
        assert build(ServeConfig, dict(application.args))


def test_runtime_env_loads_in_rays_own_validator(root: Path) -> None:
    from ray.runtime_env import RuntimeEnv

    tree = yaml.safe_load((root / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8"))
    assert "platform" in RuntimeEnv(**tree)["env_vars"]["PYTHONPATH"].split(":")


def _prepared_cluster(tree: dict[str, object]) -> dict[str, object]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, object] = prepare_config(tree)
    validate_config(prepared)
    return prepared


def test_cluster_yaml_is_valid_by_rays_own_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)  # file_mounts are relative to it
    text = (root / "cluster.yaml").read_text(encoding="utf-8")
    prepared = _prepared_cluster(yaml.safe_load(text))
    types = prepared["available_node_types"]
    assert isinstance(types, dict)
    assert types["head"]["resources"].get("GPU", 0) == 0
    assert types["gpu_worker"]["resources"]["GPU"] > 0
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"]
    for source in prepared["file_mounts"].values():  # type: ignore[attr-defined]
        assert Path(source).exists()


@pytest.mark.parametrize(
    "line", ["max_workers: 4  ", "idle_timeout_minutes", "head_node_type", "    resources: {CPU: 8"]
)
def test_a_misspelt_key_in_cluster_yaml_fails_it(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(root)
    text = (root / "cluster.yaml").read_text(encoding="utf-8")
    assert line in text
    key = line.strip().split(":")[0]
    with pytest.raises(Exception, match=r"(?s)."):
        _prepared_cluster(yaml.safe_load(text.replace(line, line.replace(key, f"{key}x"), 1)))


def test_the_commands_in_readme_and_headers_exist(root: Path) -> None:
    """Each `python -m jobs.x` names a job, each key given to it one of its keys."""
    texts = [root / "README.md", root / "cluster.yaml", *(root / "jobs").rglob("*.yaml"), *(root / "jobs").glob("*.py")]
    for text in texts:
        for name in re.findall(r"python -m jobs\.([a-z]+)", text.read_text(encoding="utf-8")):
            assert (root / "jobs" / f"{name}.py").is_file(), f"{text}: jobs.{name}"
