"""Settings: what is accepted, what is refused and how, and that files hold what was written."""

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune import BlockPruneConfig, BlockPruneError, Budget, CalibrationConfig, ConfigError, FinetuneConfig
from hf_blockprune.checkpoint.folder import read_report
from hf_blockprune.jobs.sweep import Grid
from hf_blockprune.settings_file import read_settings

SHARES = st.floats(min_value=0, max_value=1, exclude_min=True)
PATTERNS = st.lists(st.text(min_size=1, max_size=12), max_size=3)


@st.composite
def valid_configs(draw):
    method = draw(st.sampled_from(["magnitude", "taylor", "obs"]))
    weights = [st.just("auto"), st.just(0)]
    if method != "magnitude":
        weights.append(st.floats(min_value=0, max_value=1e12))
    budget = Budget(draw(st.sampled_from(["flops", "params", "density"])), draw(SHARES))
    other = Budget(draw(st.sampled_from([m for m in ("flops", "params", "density") if m != budget.metric])), 0.7)
    most_kept = budget.ratio if budget.metric == "density" else 1.0
    targets = draw(PATTERNS.filter(bool))
    return BlockPruneConfig(
        block_shape=draw(st.tuples(st.integers(1, 256), st.integers(1, 256))),
        method=method,
        refit=draw(st.sampled_from([None, True, False])),
        permute=draw(st.sampled_from([None, False, True])) if method == "obs" else None,
        permute_stream=draw(st.sampled_from([None, False])),
        coupling_rounds=draw(st.integers(0, 9)),
        token_weights=draw(st.floats(0, 1, exclude_max=True)),
        residual_targets=draw(st.booleans()),
        balance=method == "obs" and draw(st.booleans()),
        damping=draw(st.floats(1e-8, 10)),
        budget=budget,
        second_budget=draw(st.sampled_from([None, other])),
        power_weight=draw(st.one_of(weights)),
        targets=tuple(targets),
        ignore=tuple(p for p in draw(PATTERNS) if p not in targets),
        min_kept_per_layer=draw(st.floats(0, most_kept, exclude_max=most_kept == 1.0)),
        calibration=CalibrationConfig(
            samples=draw(st.integers(1, 10**6)),
            batch_size=draw(st.integers(1, 4096)),
            seed=draw(st.integers(0, 2**31)),
        ),
    )


@pytest.fixture(scope="module")
def settings_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("settings")


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@settings(max_examples=60, deadline=None)
@given(config=valid_configs())
def test_file_holds_what_was_saved(settings_folder, suffix, config):
    path = settings_folder / f"config{suffix}"
    config.save(path)
    assert BlockPruneConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("method", "refit", "refits"), [("obs", None, True), ("taylor", None, False), ("taylor", True, True)]
)
def test_refit_follows_the_method_unless_told(method, refit, refits):
    assert BlockPruneConfig(method=method, refit=refit).refits is refits


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_small_numbers_survive_a_file(tmp_path, suffix):
    """Python writes 1e-05 where YAML 1.1 wants 1.0e-05."""
    config = BlockPruneConfig(power_weight=1e-05, min_kept_per_layer=1e-07)
    config.save(tmp_path / f"config{suffix}")
    assert BlockPruneConfig.from_file(tmp_path / f"config{suffix}") == config


def test_files_are_of_the_named_kind(tmp_path):
    config = BlockPruneConfig(block_shape=(16, 8))
    config.save(tmp_path / "config.json")
    config.save(tmp_path / "config.yaml")
    from_json = json.loads((tmp_path / "config.json").read_text())
    assert from_json == yaml.safe_load((tmp_path / "config.yaml").read_text()) == config.to_dict()
    assert from_json["block_shape"] == [16, 8]


def test_the_defaults_keep_what_a_user_would():
    """As docs/prune.md says; other budgets without an amount keep as much."""
    config = BlockPruneConfig()
    assert (config.method, config.block_shape, config.budget) == ("obs", (16, 16), Budget("flops", 0.8))
    assert Budget("params").ratio == Budget("latency", device="cpu-avx512").ratio == 0.8
    assert Grid(()).block_shapes == (config.block_shape,)


def test_missing_keys_take_the_defaults(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("budget: {ratio: 0.75}\ncalibration: {samples: 32}\n")
    config = BlockPruneConfig.from_file(path)
    assert config == BlockPruneConfig(budget=Budget("flops", 0.75), calibration=CalibrationConfig(samples=32))


@pytest.mark.parametrize(
    ("values", "where", "key", "known"),
    [
        ({"blok_shape": [32, 32]}, "config", "blok_shape", "block_shape"),
        ({"budget": {"ration": 0.5}}, "budget", "ration", "ratio"),
        ({"calibration": {"sample": 12}}, "calibration", "sample", "samples"),
        ({3: "a key that is no text"}, "config", "3", "method"),
    ],
)
def test_unknown_key_is_named_beside_the_known_ones(values, where, key, known):
    with pytest.raises(ConfigError, match=rf"^{where}: unknown key {key}; known keys are .*\b{known}\b"):
        BlockPruneConfig.from_dict(values)


def test_unknown_key_in_replace_is_refused():
    with pytest.raises(ConfigError, match="unknown key methods; known keys are"):
        BlockPruneConfig().replace(methods="taylor")


NOT_A_NUMBER = [None, "0.5", True, [0.5], float("nan"), float("inf")]
IMPOSSIBLE = {
    "block_shape": [None, 32, "32x32", [], [32], [32, 32, 32], [32, 0], [-1, 32], [32.0, 32], [True, 32], "ab"],
    "method": [None, "OBS", "", 3, ["taylor"], "Taylor"],
    "budget": [None, "flops=0.5", 0.5, ["flops", 0.5]],
    "refit": ["yes", 1, 0.0],
    "coupling_rounds": [None, -1, 1.5, "4", True],
    "token_weights": [*NOT_A_NUMBER, -0.1, 1, 1.5],
    "residual_targets": [None, "yes", 1],
    "balance": [None, "yes", 1],
    "second_budget": ["flops=0.5", 0.5],
    "damping": [0, -0.1, "small", None, True],
    "power_weight": [None, -0.5, "much", True, [1], float("nan"), float("inf")],
    "targets": ["*", None, 3, [""], [3], {"a": 1}],
    "ignore": ["*", None, 3, [""], [None]],
    "min_kept_per_layer": [*NOT_A_NUMBER, -0.1, 1, 1.5],
    "calibration": [None, 512, [512]],
    "format_version": [None, 0, 2, "1"],
    "budget.metric": [None, "speed", "", 3],
    "budget.ratio": [*(value for value in NOT_A_NUMBER if value is not None), 0, -0.5, 1.01, 75],
    "calibration.samples": [None, 0, -1, 1.5, "512", True],
    "calibration.batch_size": [None, 0, -1, 1.5, "16", True],
    "calibration.seed": [None, -1, 1.5, "0", True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_impossible_value_names_its_key_and_what_is_expected(key, value):
    outer, _, inner = key.partition(".")
    with pytest.raises(ConfigError, match=rf"^{key}: expected .+, got "):
        BlockPruneConfig.from_dict({outer: {inner: value} if inner else value})


@pytest.mark.parametrize("seed", [2**64, 10**30])
def test_seed_that_torch_cannot_take_is_refused(seed):
    with pytest.raises(ConfigError, match=r"^calibration\.seed: expected "):
        CalibrationConfig(seed=seed)


CONTRADICTIONS = [
    ({"targets": ["*.fc1", "*.fc2"], "ignore": ["*.fc2"]}, r"targets and ignore both list \*\.fc2; take it out"),
    (
        {"budget": {"metric": "density", "ratio": 0.2}, "min_kept_per_layer": 0.25},
        r"min_kept_per_layer 0\.25 .*budget\.ratio 0\.2; lower min_kept_per_layer or raise the budget",
    ),
    ({"method": "magnitude", "power_weight": 0.5}, "power_weight: .*; remove power_weight or use method: taylor"),
    ({"method": "taylor", "balance": True}, "balance: needs the traces of method 'obs', not 'taylor'; leave it out"),
    (
        {"budget": {"metric": "params", "ratio": 0.5}, "second_budget": {"metric": "params", "ratio": 0.4}},
        "second_budget: params has a budget already; name another metric",
    ),
    ({"targets": []}, "targets: an empty list prunes nothing; leave the key out"),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_contradiction_names_both_keys_and_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        BlockPruneConfig.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"budget": {"metric": "flops", "ratio": 0.2}, "min_kept_per_layer": 0.25},
        {"budget": {"metric": "density", "ratio": 0.25}, "min_kept_per_layer": 0.25},
        {"method": "magnitude", "power_weight": 0},
        {"method": "magnitude", "power_weight": "auto"},
        {"method": "taylor", "power_weight": 0.5},
    ],
)
def test_settings_that_agree_are_accepted(values):
    config = BlockPruneConfig.from_dict(values)
    assert BlockPruneConfig.from_dict(config.to_dict()) == config


def test_errors_are_value_errors_of_the_package():
    assert issubclass(ConfigError, BlockPruneError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("settings_object", "key"),
    [(BlockPruneConfig(), "method"), (Budget(), "ratio"), (CalibrationConfig(), "samples")],
)
def test_settings_cannot_be_changed_in_place(settings_object, key):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings_object, key, getattr(settings_object, key))


def test_replace_checks_again_and_keeps_the_original():
    config = BlockPruneConfig()
    assert config.replace(method="magnitude").method == "magnitude"
    assert config.method == "obs"
    with pytest.raises(ConfigError, match=r"^method: expected one of magnitude, taylor, obs"):
        config.replace(method="guess")


def test_lists_become_tuples_and_configs_can_be_hashed():
    config = BlockPruneConfig(block_shape=[16, 32], targets=["*.fc1"], ignore=["*.fc2"])
    assert (config.block_shape, config.targets, config.ignore) == ((16, 32), ("*.fc1",), ("*.fc2",))
    assert len({config, config.replace()}) == 1


@given(metric=st.sampled_from(["flops", "params", "density"]), ratio=SHARES, space=st.sampled_from(["", " ", "  "]))
def test_budget_parse_reads_what_it_is_given(metric, ratio, space):
    assert Budget.parse(f"{space}{metric}{space}={space}{ratio!r}{space}") == Budget(metric, ratio)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops", r"^budget: expected METRIC=RATIO such as flops=0\.75, .*got 'flops'"),
        ("", "^budget: expected METRIC=RATIO"),
        ("flops=half", "^budget: expected METRIC=RATIO such as .*got 'flops=half'"),
        ("flops=0.5=0.5", "^budget: expected METRIC=RATIO"),
        ("speed=0.5", r"^budget\.metric: expected one of flops, params, density"),
        ("flops=75", r"^budget\.ratio: expected the share to keep"),
        ("flops=nan", r"^budget\.ratio: "),
    ],
)
def test_budget_parse_refuses_with_the_expected_form(text, message):
    with pytest.raises(ConfigError, match=message):
        Budget.parse(text)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read \(No such file.*check the path"):
        read_settings(tmp_path / "nowhere.yaml")


def test_folder_is_no_settings_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path)


@pytest.mark.parametrize("content", [b"method: [taylor", b"a: b: c", b'{"method": "taylor"', b"method: \xff\xfe"])
def test_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged\.yaml: not valid YAML or JSON") as caught:
        read_settings(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "kind"), [("- method", "list"), ("taylor", "str"), ("", "NoneType")])
def test_root_must_be_a_mapping(tmp_path, content, kind):
    path = tmp_path / "root.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"root\.yaml: expected a mapping of settings, got {kind}"):
        read_settings(path)


def test_sparsity_is_no_budget_since_it_is_what_is_removed():
    for make in (
        lambda: Budget("sparsity", 0.9),
        lambda: Budget.parse("sparsity=0.9"),
        lambda: BlockPruneConfig(budget={"metric": "sparsity", "ratio": 0.9}),
    ):
        with pytest.raises(ConfigError, match=r"write density=0\.1, to keep 90 % density=0\.9"):
            make()


@pytest.mark.parametrize("key", ["budget", "second_budget"])
def test_older_files_that_say_sparsity_are_read_as_before(key, tmp_path):
    budget = {"metric": "sparsity", "ratio": 0.9}
    saved = {**BlockPruneConfig().to_dict(), key: budget}
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    assert getattr(BlockPruneConfig.from_file(tmp_path / "saved.json"), key) == Budget("density", 0.9)
    (tmp_path / "own.json").write_text(json.dumps({key: budget}))
    with pytest.warns(FutureWarning, match=r"sparsity keeps 0\.9 of the blocks, as ever; write density"):
        own = BlockPruneConfig.from_file(tmp_path / "own.json")
    assert getattr(own, key) == Budget("density", 0.9)


def test_older_files_that_say_sparsity_alone_keep_half_as_before():
    with pytest.warns(FutureWarning, match=r"sparsity keeps 0\.5 of the blocks, as ever; write density"):
        config = BlockPruneConfig.from_dict({"budget": {"metric": "sparsity"}})
    assert config.budget == Budget("density", 0.5)


def test_older_training_recipes_that_say_sparsity_are_read_as_before():
    with pytest.warns(FutureWarning, match="write density"):
        config = FinetuneConfig.from_dict({"gradual": {"budget": {"metric": "sparsity", "ratio": 0.6}}})
    assert config.gradual is not None
    assert config.gradual.budget == Budget("density", 0.6)


def test_older_reports_that_say_sparsity_are_read_as_before(tmp_path):
    config = {**BlockPruneConfig().to_dict(), "budget": {"metric": "sparsity", "ratio": 0.9}}
    report = {"base_model": "m", "config": config, "layers": [], "seconds": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    values = read_report(tmp_path / "report.json")
    assert values is not None
    assert values.config["budget"] == {"metric": "density", "ratio": 0.9}
