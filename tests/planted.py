"""Faults that tests must see: each is planted alone into a copy of the checkout, and the tests beside it must fail.

`python tests/planted.py` takes a quarter of an hour on two cores that are shared; `python tests/planted.py rollout.py`
plants only those with this word in their path or old text. Exits 1 if a fault survives. A line that can be wrong unseen
is one that nothing holds: a new setting that has to reach some place far away gets an entry here. Run by hand and
nightly; that the entries fit the code is part of the tests (`test_planted.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """A wrong line of code.

    Attributes:
        file: that it is planted in.
        old: what stands there once.
        new: what takes its place.
        tests: all of which must fail, as pytest names them; one without its case in brackets, in one of its cases.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def failing(tests: tuple[str, ...], fault: Fault | None = None) -> list[str]:
    """Those of the tests that fail, or whose fixtures do, in a copy of the checkout with a fault in it.

    Raises:
        ValueError: the old text is not there once.
        RuntimeError: pytest came to no verdict.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist"))
        if fault:
            text = (copy / fault.file).read_text()
            if text.count(fault.old) != 1:
                raise ValueError(f"expected the old text once in the file, got it {text.count(fault.old)} times")
            (copy / fault.file).write_text(text.replace(fault.old, fault.new))
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=no", *tests]
        # No files of bytecode: they know their source by its second and size, which a fault may not change.
        changes = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, cwd=copy, env=os.environ | changes, capture_output=True, text=True)
    if found.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {found.returncode}: {found.stdout}{found.stderr}")
    failed = [line.partition(" ")[2] for line in found.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [test for test in tests if any(line.startswith(test) for line in failed)]


def verdict(fault: Fault) -> str:
    """Whether a fault was seen, in words."""
    try:
        unseen = set(fault.tests) - set(failing(fault.tests, fault))
    except (ValueError, RuntimeError) as error:
        return f"ERROR: {error}"
    return f"SURVIVED {', '.join(sorted(unseen))}" if unseen else "seen"


def main(words: list[str]) -> int:
    """Plant what has one of the words in its path or its old text, all without words; 1 if one survives."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.file + fault.old for word in words)]
    bad = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = pool.submit(failing, tuple(dict.fromkeys(test for fault in chosen for test in fault.tests)))
        for fault, result in zip(chosen, pool.map(verdict, chosen), strict=True):
            old, new = (" ".join(text.split()) for text in (fault.old, fault.new))
            print(f"{fault.file}: {old} -> {new or 'nothing'}: {result}", flush=True)
            bad += result != "seen"
        broken = whole.result()
    for test in broken:  # it says nothing of a fault
        print(f"{test} fails without a fault")
    print(f"{len(chosen)} faults, {bad} of them not seen or not planted")
    return int(bool(bad or broken))


# By file: what stands there, what takes its place, the tests that must fail (below tests/).
_PLANTED: dict[str, list[tuple[str, ...]]] = {
    "benchmarks/on_gpu.sh": [
        ("rest=$((rest - ${kept[$part]:-0}))", "true", "benchmarks/test_on_gpu.py::test_shares"),
        (
            '&& echo "$found" && failed=1',
            '&& echo "$found"',
            "benchmarks/test_on_gpu.py::test_what_is_cut_off_hides_no_failure",
        ),
        (
            "if [ $vain = 2 ]",
            "if false",
            "benchmarks/test_on_gpu.py::test_a_process_that_ends_before_its_first_pass",
        ),
    ],
    "benchmarks/records.py": [
        ('b"\\n" * cut_off + ', "", "benchmarks/test_order.py::test_a_line_that_was_cut_off"),
    ],
    "kernels/common/launching.py": [
        (
            "tensor.data_ptr() % 16 == 0",
            "True",
            "ops/test_launching.py::test_the_compiled_kernel_is_the_one_that_triton_finds",
        ),
        (
            "*self._numbers(arguments),",
            "",
            "ops/test_launching.py::test_the_compiled_kernel_is_the_one_that_triton_finds",
        ),
        (
            "        if found is not None:",
            "        if False:",
            "ops/test_launching.py::test_from_the_second_launch_on_triton_does_not_look",
        ),
    ],
    "fastvar/tuning.py": [
        (
            "except torch.OutOfMemoryError as error:",
            "except KeyError as error:",
            "test_tuning.py::test_a_workload_that_takes_too_much_memory_is_left_out",
        ),
        (
            "                    failed = True",
            "                    self._still_works(table, packaged, key, call)",
            "test_tuning.py::test_what_a_candidate_leaves_behind_is_freed",
        ),
    ],
    "fastvar/ops/_dispatch.py": [
        ("or (equals and not op)", "", "ops/test_dispatch.py::test_environment_variable"),
        (
            " or asked.broken(traits.tensor)",
            "",
            "ops/test_attention_packages.py::test_a_package_that_does_not_import",
        ),
    ],
    "fastvar/models/graphs.py": [
        (
            '        tuple(getattr(backends.cuda, f"{name}_sdp_enabled")() for name in kernels),\n',
            "",
            "models/test_graphs.py::test_settings_of_attention",
        ),
        (
            '_say(model, f"runs without CUDA graphs: expected {found}")',
            "pass",
            "models/test_graphs.py::test_where_nothing_can_be_captured",
        ),
        (
            "        _say(model, TOO_MUCH)\n        return False",
            "        return False",
            "models/test_graphs.py::test_memory_is_bounded",
        ),
    ],
    "kernels/block_causal_attention/flash_attn_4.py": [
        (
            "dk, dv = (torch.zeros(",
            "dk, dv = (torch.nan + torch.zeros(",
            "ops/test_attention_packages.py::test_as_the_reference",
        ),
        ("expand(LARGEST_ROWS - 1)", "expand(0)", "ops/test_attention_packages.py::test_as_the_reference"),
    ],
    "fastvar/latency.py": [
        ("seed=seed, **options", "seed=0, **options", "test_latency.py::test_a_model_and_a_pipeline_of_classes"),
        ("if turn >= 0:", "if True:", "test_latency.py::test_rounds_count_and_the_first_ones_do_not"),
        (
            'output_type="np", **self.given)',
            'output_type="np")',
            "test_latency.py::test_a_model_and_a_pipeline_of_classes",
            "test_latency.py::test_a_model_and_a_pipeline_of_texts",
        ),
    ],
    "fastvar/cli/latency.py": [
        (
            "model = model.to(getattr(torch, self.dtype))",
            "pass",
            "test_latency.py::test_a_model_and_a_pipeline_of_classes",
        ),
    ],
    "fastvar/rl/update.py": [
        (
            "        options,\n        old_log_probs",
            "        old_log_probs",
            "rl/test_wiring.py::test_entropy_weight",
            "rl/test_wiring.py::test_loss_of_the_trainer",
        ),
        ("        temperature=temperature,\n", "", "rl/test_wiring.py::test_temperature_of_policy_and_reference"),
        (
            "tokens, temperature=temperature).log_probs",
            "tokens).log_probs",
            "rl/test_wiring.py::test_temperature_of_policy_and_reference[k2]",
            "rl/test_wiring.py::test_temperature_of_policy_and_reference[k3]",
        ),
        (
            "taken(old_log_probs, rows)",
            "old_log_probs[: len(rows)]",
            "rl/test_wiring.py::test_a_part_has_its_own_rows",
            "rl/test_wiring.py::test_second_update_is_compared_with_its_own_rows",
        ),
        ("taken(advantages, rows)", "advantages[: len(rows)]", "rl/test_wiring.py::test_a_part_has_its_own_rows"),
        ("taken(mask, rows)", "mask[: len(rows)]", "rl/test_wiring.py::test_a_part_has_its_own_rows"),
        (
            "first_scale=first_scale",
            "first_scale=0",
            "rl/test_wiring.py::test_the_fine_segment_is_trained_alone",
        ),
        ("        mask_totals=mask_totals,\n", "", "rl/test_rollout.py::test_gradients_of_parts_add_up"),
        (
            "model.take(rollout.conditions, rows)",
            "model.take(rollout.conditions, range(len(rows)))",
            "rl/test_infinity_policy.py::test_log_probs_of_rollout_and_training_agree",
        ),
    ],
    "kernels/block_causal_attention/impl_triton.py": [
        (
            "tl.where(begin < whole, 0, last - whole)",
            "0",
            "interpreted/test_in_processes.py::test_kernels_in_the_interpreter[test_attention.py]",
        ),
    ],
    "kernels/adaptive_layer_norm/tiles.py": [
        ("for stages in (3, 2, 1)", "for stages in (2, 1)", "ops/test_ahead_of_time.py::test_rows_of_channels"),
    ],
    "kernels/token_log_probs/policy.py": [
        ("cost + options.kl_weight * kl", "cost", "rl/test_wiring.py::test_kl"),
        ("cost - options.entropy_weight *", "cost - 0.0 *", "rl/test_wiring.py::test_entropy_weight"),
        (
            "1 + options.clip_high",
            "1 + options.clip_low",
            "rl/test_wiring.py::test_clipping_has_two_sides[1.0--1.0--1.4]",
        ),
        (
            "1 - options.clip_low",
            "1 - options.clip_high",
            "rl/test_wiring.py::test_clipping_has_two_sides[-1.0-1.0-0.9]",
        ),
        (
            "[options.ratio_level]",
            '["token"]',
            "rl/test_wiring.py::test_ratio_level[scale]",
            "rl/test_wiring.py::test_ratio_level[sample]",
        ),
        ("options.panw_alpha,", "0.0,", "rl/test_wiring.py::test_per_action_normalisation"),
        (
            "= call.schedule, call.options.panw_normalisation",
            '= call.schedule, "per_segment"',
            "rl/test_wiring.py::test_per_action_normalisation",
        ),
        ('if estimator == "k2"', "if False", "rl/test_wiring.py::test_kl[k2]"),
        (
            "return self.options.kl_weight * share",
            "return share",
            "ops/test_policy_loss.py::test_equals_the_definition",
        ),
        ("-options.entropy_weight * share", "-share", "ops/test_policy_loss.py::test_equals_the_definition"),
        ("options.kl_weight * share if", "share if", "ops/test_policy_loss.py::test_equals_the_definition"),
        ("product = ratio * gain", "product = gain", "ops/test_policy_loss.py::test_equals_the_definition"),
        ("moves & ~held, product", "moves, product", "ops/test_policy_loss.py::test_equals_the_definition"),
    ],
    "kernels/token_log_probs/impl_torch.py": [
        ("call.reference, call.temperature)", "call.reference)", "ops/test_policy_loss.py::test_equals_the_definition"),
    ],
    "kernels/token_log_probs/losses.py": [
        ("call.reference, call.temperature)", "call.reference)", "ops/test_policy_loss.py::test_equals_the_definition"),
        (
            "return torch.float32 if dtype == torch.float16 else dtype",
            "return dtype",
            "ops/test_log_probs_devices.py::test_float16_gradients_below_the_least_float16",
        ),
    ],
    "kernels/token_log_probs/reference.py": [
        ("call.reference, call.temperature)", "call.reference)", "ops/test_policy_loss.py::test_equals_the_definition"),
    ],
    "fastvar/data/prompt_sets.py": [
        ("quoted_texts(prompt) or (prompt,)", "(prompt,)", "data/test_prompt_sets.py::test_quoted_texts"),
        (
            'key=lambda entry: int(entry["index"])',
            'key=lambda entry: str(entry["index"])',
            "data/test_prompt_sets.py::test_cvtg",
        ),
    ],
    "fastvar/data/regions.py": [
        (
            'derive(seed, "regions", number)',
            'derive(0, "regions", number)',
            "data/test_regions.py::test_drawn_to_the_target",
        ),
    ],
    "fastvar/data/pairs.py": [
        (
            "int(torch.randint(len(item.references), ()))",
            "0",
            "data/test_pairs.py::test_items",
        ),
    ],
    "fastvar/cli/sources.py": [
        ("seed=0 if train else 1", "seed=0", "test_cli.py::test_prompts_of_texts"),
        (
            "found.repeated(len(photos))",
            "found.take(list(range(len(found))) * len(photos))",
            "test_cli.py::test_prompts_of_texts",
        ),
    ],
    "fastvar/cli/recipe.py": [
        (
            "crc32(json.dumps(arguments).encode(), known_by)",
            "crc32(json.dumps(arguments).encode())",
            "test_recipes.py::test_steps_run_once",
        ),
        (
            "planned.recorded or not self.resume",
            "not self.resume",
            "test_recipes.py::test_a_benchmark_is_in_the_table",
        ),
        (
            'else ["--no-resume"]',
            "else []",
            "test_recipes.py::test_changed_training_starts_anew",
        ),
    ],
    "recipes/hpsv3/server.py": [
        (
            "prompts=prompts[part], image_paths=images[part]",
            "prompts=prompts, image_paths=images[part]",
            "rl/test_hpsv3_server.py::test_scores_come_back",
        ),
    ],
    "fastvar/rl/trainer.py": [
        ("if math.isfinite(norm):", "if gradient_norm.isfinite():", "training/test_waiting.py::test_an_update"),
        (
            "        mask[len(own) :] = 0\n",
            "",
            "rl/test_rl_processes.py::test_another_number_of_processes_goes_on",
        ),
        (
            "rollout.continuations, eta=config.eta",
            "rollout.continuations",
            "rl/test_wiring.py::test_returns_and_advantages_of_the_settings",
        ),
        (
            "            spread_floor=config.spread_floor,\n",
            "",
            "rl/test_wiring.py::test_returns_and_advantages_of_the_settings",
        ),
        (
            "            normalise=config.normalise,\n",
            "",
            "rl/test_wiring.py::test_returns_and_advantages_of_the_settings",
        ),
        (
            "config.rollout.temperature, self.reference",
            "1.0, self.reference",
            "rl/test_wiring.py::test_temperature_of_the_trainer",
        ),
        (
            "part_loss, config.loss,",
            "part_loss, type(config.loss)(kl_weight=config.loss.kl_weight),",
            "rl/test_wiring.py::test_loss_of_the_trainer",
        ),
        (
            "parameter_groups(policy, config.weight_decay)",
            "parameter_groups(policy, 0.0)",
            "rl/test_wiring.py::test_optimizer_of_the_trainer",
        ),
        (", betas=config.betas", "", "rl/test_wiring.py::test_optimizer_of_the_trainer"),
        (
            "EMA(blueprint, config.ema_decay)",
            "EMA(blueprint, 0.95)",
            "rl/test_wiring.py::test_optimizer_of_the_trainer",
        ),
        (
            "self.model.parameters(), config.clip_norm",
            "self.model.parameters(), math.inf",
            "rl/test_wiring.py::test_gradients_of_the_trainer_are_clipped",
        ),
        (
            "graded.totals, old_log_probs)",
            "graded.totals, None)",
            "rl/test_trainer.py::test_several_updates_on_a_rollout",
        ),
        (
            "log_probs.index_copy_(0, indices(rows, log_probs.device), loss.log_probs)",
            "log_probs[: len(rows)] = loss.log_probs",
            "rl/test_wiring.py::test_second_update_is_compared_with_its_own_rows[0-3]",
        ),
        (
            "log_probs if self.config.rescore else rollout.log_probs",
            "rollout.log_probs",
            "rl/test_wiring.py::test_rescoring[True]",
        ),
        (
            "        self.optimizer.zero_grad(set_to_none=not config.update_graphs)\n",
            "",
            "rl/test_wiring.py::test_gradients_of_one_update_do_not_reach_the_next",
        ),
        (
            "set_to_none=not config.update_graphs",
            "set_to_none=True",
            "training/test_graphed.py::test_reinforcement_learning",
        ),
        (
            "GraphedStep(self._part, self.model, *others) if config.update_graphs else self._part",
            "self._part",
            "training/test_graphed.py::test_reinforcement_learning",
        ),
        (
            'check_alone("RLConfig: update_graphs", config.update_graphs, self.accelerator)',
            "pass",
            "training/test_graphed.py::test_several_processes_are_refused",
        ),
        ("            self.ema.update(self.policy)\n", "", "rl/test_wiring.py::test_optimizer_of_the_trainer"),
        (
            '"prompts", iteration',
            '"prompts"',
            "rl/test_wiring.py::test_every_iteration_and_seed_draws_anew",
        ),
        (
            'derive(config.seed, "rollout", iteration)',
            'derive(config.seed, "rollout")',
            "rl/test_wiring.py::test_a_prompt_that_comes_again_is_drawn_anew",
        ),
        (
            'derive(config.seed, "rollout", iteration)',
            'derive(0, "rollout", iteration)',
            "rl/test_wiring.py::test_a_prompt_that_comes_again_is_drawn_anew",
        ),
        (
            "        if config.filter_groups:\n",
            "        if False:\n",
            "rl/test_trainer.py::test_groups_without_spread_are_left_out",
        ),
        (
            "use_mask=config.use_mask",
            "use_mask=False",
            "rl/test_trainer.py::test_what_saves_memory_does_not_change_gradients[changes0]",
        ),
        (
            "mask[:, : schedule.starts[rollout.first_scale]] = 0",
            "pass",
            "rl/test_wiring.py::test_the_fine_segment_is_trained_alone",
        ),
        (
            "policy if has_adapters(policy) else blueprint.clone()",
            "blueprint.clone()",
            "rl/test_trainer.py::test_adapters",
        ),
        (
            "self.evaluations(self.ema.model,",
            "self.evaluations(self.policy,",
            "rl/test_wiring.py::test_the_best_is_kept",
        ),
        (
            "continue_with=self.reference if config.reference_continues else None",
            "continue_with=None",
            "rl/test_infinity_policy.py::test_continue_with_of_the_trainer",
        ),
        (
            "config.loss.kl_weight != 0 or config.reference_continues",
            "config.loss.kl_weight != 0",
            "rl/test_infinity_policy.py::test_continue_with_of_the_trainer",
        ),
        ("mesh_of(reference) is None and (mesh", "(mesh", "rl/test_rl_processes.py::test_sharded_infinity"),
        (
            'self.progress.kl = measured.get("kl", 0.0)',
            "self.progress.kl = 0.0",
            "rl/test_trainer.py::test_stops_at_a_large_kl",
        ),
    ],
    "fastvar/rl/ahead.py": [
        (
            "if len(masks) == len(parts) else None",
            "if masks else None",
            "rl/test_ahead.py::test_a_mask_holds_if_all_parts_have_one",
        ),
        ("            future.cancel()\n", "            pass\n", "rl/test_ahead.py::test_an_interrupt_does_not_wait"),
        ("wait([future], timeout=0.25)", "wait([future])", "rl/test_ahead.py::test_an_interrupt_does_not_wait"),
        ("        self._parts.put(None)\n", "", "rl/test_ahead.py::test_an_interrupt_does_not_wait"),
    ],
    "fastvar/rl/rewards/in_process.py": [
        ("with self._lock:", "if True:", "rl/test_ahead.py::test_two_threads_ask_one_process"),
        (
            "signal.signal(number, signal.SIG_IGN)",
            "pass",
            "rl/test_ahead.py::test_a_reward_in_a_process_of_its_own",
        ),
        (
            "self._connection = None\n                if",
            "if",
            "rl/test_ahead.py::test_a_reward_in_a_process_of_its_own",
        ),
    ],
    "fastvar/rl/run_evaluations.py": [
        ("processes.any(total > self.progress.best)", "True", "rl/test_wiring.py::test_the_best_is_kept"),
    ],
    "fastvar/rl/scores.py": [
        (".any(1)", ".all(1)", "rl/test_wiring.py::test_mask_is_the_union_over_the_continuations"),
        (
            "rollout.prompts.repeated(rollout.continuations)",
            "rollout.prompts.take([i % len(rollout.prompts) for i in range(len(rollout.images))])",
            "rl/test_wiring.py::test_prompts_of_continuations_are_adjacent",
        ),
    ],
    "fastvar/rl/prompts.py": [
        (
            "model.pyramid(",
            "model.tokenizer.pyramid(",
            "rl/test_wiring.py::test_references_reach_the_model_as_it_was_trained",
        ),
        (
            "for i in range(len(self)) for _ in range(times)",
            "for _ in range(times) for i in range(len(self))",
            "rl/test_wiring.py::test_prompts_of_continuations_are_adjacent",
        ),
        (
            "non_blocking=True) * 2 - 1",
            "non_blocking=True)",
            "rl/test_wiring.py::test_references_reach_the_model_as_it_was_trained",
        ),
        (
            "None if labels is None else list(labels)",
            "None",
            "rl/test_wiring.py::test_other_prompts_have_another_fingerprint",
        ),
    ],
    "fastvar/rl/returns.py": [
        (
            "/ valid.sum(1, keepdim=True)",
            "/ valid.shape[1]",
            "rl/test_wiring.py::test_soft_value_of_the_continuations_that_are_there",
        ),
        ("flat = eta * average", "flat = average", "rl/test_returns.py::test_definition[7.0]"),
    ],
    "fastvar/statistics.py": [
        (
            "offset = moved.sum(1, keepdim=True) / count",
            "offset = moved.mean(1, keepdim=True)",
            "rl/test_trainer.py::test_missing_scores_are_missing_everywhere",
        ),
    ],
    "fastvar/rl/rollout.py": [
        (
            "range(self.first_prompt, -(-rows.stop // group_size))",
            "range(len(prompts))",
            "rl/test_infinity_policy.py::test_texts_are_encoded_once_and_where_they_are_drawn",
        ),
        ("**self.options.arguments(model),", "", "rl/test_wiring.py::test_rollouts_are_drawn_as_told"),
        (
            "each_part(own.images, prompts_of(part).repeated(times))",
            "each_part(own.images, prompts_of(rows[: len(part)]).repeated(times))",
            "rl/test_ahead.py::test_what_is_learned_is_the_same",
        ),
        (
            "(2 if self.options.guides(model) else 1)",
            "1",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        (
            "prompts.take([row // group_size",
            "prompts.take([row % len(prompts)",
            "rl/test_rollout.py::test_shapes_of_the_segments",
        ),
        (
            "row // rows_per_prompt - self.first_prompt for row in rows",
            "0 for row in rows",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        (
            "first_row, reference = rows.start * times",
            "first_row, reference = rows.start",
            "rl/test_rollout.py::test_chunks_do_not_change_the_images[3-coarse]",
        ),
        ('middle if segment == "fine" else 0,', "0,", "rl/test_rollout.py::test_shapes_of_the_segments"),
        (
            "with as_reference(reference, self.model):",
            "if reference is not None:",
            "rl/test_infinity_policy.py::test_the_reference_may_be_the_policy_without_adapters",
        ),
        (
            "guided = self.options.guides(reference)",
            "guided = False",
            "rl/test_infinity_policy.py::test_the_reference_continues[2.0-policy]",
        ),
    ],
    "fastvar/rl/evaluate.py": [
        (", held_out=True)", ")", "rl/test_held_out.py::test_evaluations_show_it"),
        (
            "i * len(prompts) // groups for i",
            "i % len(prompts) for i",
            "rl/test_wiring.py::test_evaluations_spread_over_the_prompts",
        ),
        (
            "first, end = part * groups // parts,",
            "first, end = 0,",
            "rl/test_wiring.py::test_evaluations_spread_over_the_prompts",
        ),
        (
            "standardise=False",
            "standardise=True",
            "rl/test_trainer.py::test_evaluation_of_standardised_rewards_is_not_standardised",
        ),
    ],
    "fastvar/rl/config.py": [
        ("place < self.coarse_updates", "place <= self.coarse_updates", "rl/test_trainer.py::test_alternation"),
    ],
    "fastvar/rl/measuring.py": [
        (
            "weight = part.sum() / whole.sum()",
            "weight = 1.0",
            "rl/test_trainer.py::test_what_saves_memory_does_not_change_gradients[changes0]",
        ),
    ],
    "fastvar/rl/rewards/base.py": [
        ("mask | own", "mask & own", "rl/test_rewards.py::test_masks_of_several_rewards_are_put_together"),
        (
            "                everywhere = True\n",
            "                pass\n",
            "rl/test_rewards.py::test_weighted_sum_and_each_reward",
        ),
        (
            "total + self.weights[name] * scores.double()",
            "total + scores.double()",
            "rl/test_rewards.py::test_weighted_sum_and_each_reward",
        ),
        ("deviations[0] / (spread[0] + 1e-6)", "deviations[0]", "rl/test_rewards.py::test_standardised"),
    ],
    "fastvar/rl/preflight.py": [
        (", held_out=True)", ")", "rl/test_held_out.py::test_it_is_tried_before_the_first_step"),
    ],
    "fastvar/rl/rewards/models.py": [
        ("self._device or images.device", "images.device", "rl/test_reward_models.py::test_a_device_of_its_own"),
    ],
    "fastvar/rl/rewards/openclip.py": [
        ("_NETWORKS[self.name] = model", "pass", "rl/test_reward_models.py::test_weights_are_loaded_once"),
    ],
    "fastvar/image_benchmarks/scoring.py": [
        ('about.get("of") != of', "False", "image_benchmarks/test_scoring.py::test_nothing_is_scored_twice"),
        (
            "[benchmark.name, ",
            "[",
            "image_benchmarks/test_prompts.py::test_scores_by_something_else_are_made_again",
        ),
        (
            '"options": plain_options(scorer),',
            "",
            "image_benchmarks/test_prompts.py::test_scores_by_something_else_are_made_again",
        ),
        (
            "_write(path, of, part)",
            "pass",
            "image_benchmarks/test_scoring.py::test_nothing_is_scored_twice",
        ),
    ],
    "fastvar/image_benchmarks/prompts.py": [
        (".view(-1, self.per_prompt).nanmean(1)", "", "image_benchmarks/test_prompts.py::test_by_hand"),
    ],
    "fastvar/cli/benchmarks.py": [
        ("self._check_read(scoring)", "pass", "test_cli_benchmarks.py::test_a_mistake_is_one_line"),
    ],
    "fastvar/image_benchmarks/drawing.py": [
        ("first_sample=start", "first_sample=0", "image_benchmarks/test_drawing.py::test_images_of_classes"),
        ("seed=seed, first", "first", "image_benchmarks/test_drawing.py::test_images_of_classes"),
    ],
    "fastvar/image_benchmarks/dreambench.py": [
        ("torch.cat(features).mean(0)", "features[0][0]", "image_benchmarks/test_dreambench.py::test_by_hand"),
        ("parts[kind in LIVE]", "parts[0]", "image_benchmarks/test_dreambench.py::test_prompts"),
    ],
    "fastvar/image_benchmarks/cvtg.py": [
        (
            "(Counter(goal) & Counter(found)).total()",
            "sum(word in found for word in goal)",
            "image_benchmarks/test_cvtg.py::test_words",
        ),
        (
            'taken["right"], taken["words"]',
            'taken["right"] / taken["words"], torch.ones(len(rows))',
            "image_benchmarks/test_cvtg.py::test_by_hand",
        ),
    ],
    "fastvar/rl/rewards/ocr.py": [
        ("min((confidence for other", "max((confidence for other", "rl/test_rewards.py::test_ocr_by_hand"),
        ("int(-(-bottom // 1))", "int(bottom)", "rl/test_rewards.py::test_ocr_with_any_reader"),
        ("int(-(-right // 1))", "int(right)", "rl/test_rewards.py::test_ocr_with_any_reader"),
        ("(complete + similar) / len(goal)", "(complete + similar)", "rl/test_rewards.py::test_ocr_by_hand"),
    ],
    "fastvar/pictures.py": [
        (
            "* 255).round().to(torch.uint8)",
            "* 255).to(torch.uint8)",
            "rl/test_rewards.py::test_eight_bits_are_the_nearest",
        ),
    ],
    "fastvar/rl/rewards/pixels.py": [
        ("self.sign = 1.0 if larger else -1.0", "self.sign = -1.0", "rl/test_rewards.py::test_jpeg_size"),
        ("quality=self.quality", "quality=95", "rl/test_rewards.py::test_jpeg_size"),
        ("Reward(inside - rest, mask)", "Reward(inside, mask)", "rl/test_rewards.py::test_colour"),
    ],
    "fastvar/rl/adapters.py": [
        ("2 * rank if alpha is None else alpha", "2 * rank", "rl/test_wiring.py::test_adapters_have_their_settings"),
        (
            "target_modules=list(targets)",
            "target_modules=list(TARGETS)",
            "rl/test_wiring.py::test_adapters_have_their_settings",
        ),
        ('model.clone("cpu")', "model.clone()", "rl/test_trainer.py::test_what_is_saved_is_made_elsewhere"),
        ('derive(seed, "adapters")', "seed", "rl/test_wiring.py::test_adapters_follow_from_the_seed"),
    ],
    "fastvar/cli/models.py": [
        (
            'derive(self.train.seed, "weights"))\n        result',
            "self.train.seed)\n        result",
            "test_cli.py::test_weights_follow_from_the_seed",
        ),
        (
            'derive(self.train.seed, "weights"))\n        if start',
            "self.train.seed)\n        if start",
            "test_cli.py::test_weights_follow_from_the_seed",
        ),
    ],
    "fastvar/training/loop.py": [
        (
            'torch.stack([loss.float(), norm.float()]).to("cpu", non_blocking=True)',
            'torch.stack([loss.float(), norm.float()]).to("cpu")',
            "training/test_waiting.py::test_what_follows_a_backward_pass",
        ),
        (
            "optimizer.optimizer.found_inf = check.bad ",
            "check.raise_if_bad() ",
            "training/test_waiting.py::test_a_training_step",
        ),
        (
            'derive(config.seed, "training", accelerator.process_index)',
            'derive(config.seed, "training")',
            "training/test_loop.py::test_seed_of_a_process",
        ),
        (
            'derive(config.seed, "training", accelerator.process_index)',
            'derive(0, "training", accelerator.process_index)',
            "training/test_loop.py::test_seed_of_a_process",
        ),
        ('"seeds": SEEDS,', "", "training/test_loop.py::test_resuming_with_other_settings_is_refused"),
        (
            "model.parameters(), config.clip_norm",
            "model.parameters(), math.inf",
            "training/test_loop.py::test_what_the_optimizer_is_given[0.001]",
        ),
        (
            "parameter_groups(task.model, config.weight_decay)",
            "parameter_groups(task.model, 0.0)",
            "training/test_loop.py::test_what_the_optimizer_is_given",
        ),
        (", betas=config.betas", "", "training/test_loop.py::test_what_the_optimizer_is_given"),
        (
            'group["lr"] = rate',
            'group["lr"] = config.learning_rate',
            "training/test_loop.py::test_what_the_optimizer_is_given",
        ),
        (
            "EMA(blueprint, config.ema_decay)",
            "EMA(blueprint, 0.9)",
            "training/test_loop.py::test_without_decay_the_average_is_the_model",
        ),
        (
            "accelerator.backward(loss / config.accumulate)",
            "accelerator.backward(loss)",
            "training/test_loop.py::test_accumulation_gives_the_same_gradients",
        ),
        ("        seed=config.seed,\n", "        seed=0,\n", "training/test_loop.py::test_seed_decides_the_order"),
        ("    if not config.graphs:\n", "    if True:\n", "training/test_graphed.py::test_training"),
        ("set_to_none=not config.graphs", "set_to_none=True", "training/test_graphed.py::test_training"),
        (
            'check_alone("TrainConfig: graphs", config.graphs, accelerator)',
            "pass",
            "training/test_graphed.py::test_several_processes_are_refused",
        ),
        ('enabled=config.precision == "bf16"', "enabled=False", "training/test_loop.py::test_bf16_computes_in_bf16"),
        ("0.5 * (1 + math.cos(math.pi * progress))", "(1 - progress)", "training/test_loop.py::test_learning_rate"),
    ],
    "fastvar/training/ema.py": [
        (
            "min(self.decay, (1 + self.updates) / (10 + self.updates))",
            "(1 + self.updates) / (10 + self.updates)",
            "training/test_loop.py::test_average_is_apart_from_the_weights",
        ),
        (
            "min(self.decay, (1 + self.updates) / (10 + self.updates))",
            "self.decay",
            "training/test_loop.py::test_average_is_apart_from_the_weights",
        ),
    ],
    "fastvar/training/batches.py": [
        ('derive(self.seed, "buckets")', "self.seed", "training/test_batches.py::test_buckets_of_steps_by_definition"),
        (
            "len(own), self.seed, bucket)",
            "len(own), self.seed)",
            "training/test_batches.py::test_buckets_of_equal_size_have_orders_of_their_own",
        ),
        (
            '"epoch", epoch',
            '"epoch"',
            "training/test_batches.py::test_every_epoch_draws_every_item_once",
        ),
        ("(step * self.world_size + self.rank)", "step", "training/test_batches.py::test_processes_share_a_step"),
        (
            "done = chosen[: self.first_step].bincount(minlength=len(counts)).tolist()",
            "done = [0] * len(counts)",
            "training/test_batches.py::test_buckets_of_later_steps_and_of_several_processes",
        ),
        (
            "with seeded(self.seed, position)",
            "with seeded(self.seed, index)",
            "training/test_batches.py::test_augmentation_depends_on_the_position_alone",
        ),
        (
            "            random.setstate(before[0])\n",
            "",
            "training/test_batches.py::test_drawing_items_leaves_the_random_states_alone",
        ),
    ],
    "fastvar/training/infinity_task.py": [
        ("net.pyramid(", "net.tokenizer.pyramid(", "training/test_infinity_task.py::test_a_subject_is_read"),
        (
            "seed=int(torch.randint(2**31, ()))",
            "seed=0",
            "training/test_infinity_task.py::test_flips_and_dropped_texts",
        ),
        (
            ", scales=self.flip_scales",
            "",
            "training/test_infinity_task.py::test_flips_and_dropped_texts",
        ),
        (
            " if self.weighted else None",
            "",
            "training/test_infinity_task.py::test_equals_the_definition[False]",
        ),
        (
            "            check(dataset.texts)\n",
            "            pass\n",
            "training/test_infinity_task.py::test_ratios_in_buckets",
        ),
    ],
    "fastvar/cli/infinity.py": [
        (
            "net.gradient_checkpointing = options.gradient_checkpointing",
            "pass",
            "test_cli_infinity.py::test_handwriting",
        ),
        (", flip_strength=options.flip_strength", "", "test_cli_infinity.py::test_handwriting"),
    ],
    "fastvar/models/encoded_texts.py": [
        (
            'found.packed.to("cpu", encoder.dtype)',
            'found.packed.to("cpu", torch.bfloat16)',
            "models/test_encoded_texts.py::test_t5_in_its_own_dtype",
        ),
    ],
    "fastvar/data/text_images.py": [
        ("margin=1.0", "margin=1.125", "data/test_text_images.py::test_an_image_fills_its_size"),
    ],
    "fastvar/training/var_task.py": [
        ("var.pyramid(", "var.tokenizer.pyramid(", "training/test_var_task.py::test_a_subject_is_read"),
        (
            "[model.scale_index.cpu()]",
            "[model.scale_index.cpu() * 0]",
            "training/test_var_task.py::test_equals_pytorch[scale_weights1-0.0]",
        ),
        (
            '{"label_smoothing": self.label_smoothing,',
            '{"label_smoothing": 0.0,',
            "training/test_var_task.py::test_equals_pytorch[None-0.1]",
        ),
    ],
    "fastvar/training/log.py": [
        (
            'line["step"] <= first_step',
            'line["step"] < first_step',
            "training/test_loop.py::test_resume_is_bit_equal[4-tokenizer]",
        ),
    ],
    "fastvar/models/checkpoints.py": [
        (
            "num_heads or embed_dim // 64",
            "num_heads or embed_dim // 32",
            "models/test_var_golden.py::test_what_leaves_no_trace_in_the_weights",
        ),
        ("cosine=znorm", "cosine=False", "models/test_var_golden.py::test_what_leaves_no_trace_in_the_weights"),
        (
            "norm_groups=norm_groups,",
            "norm_groups=32,",
            "models/test_var_golden.py::test_what_leaves_no_trace_in_the_weights",
        ),
        (
            'state["class_emb.weight"].shape[0] - 1',
            'state["class_emb.weight"].shape[0]',
            "models/test_var_golden.py::test_weights_of_a_wrapped_model",
        ),
    ],
    "fastvar/models/bsq_tokenizer.py": [
        (
            "flip_probability=flip_probability,",
            "flip_probability=None,",
            "models/test_bsq_tokenizer.py::test_self_correction_flips_before_the_next_scale",
        ),
        (
            "first_image=first_image,",
            "first_image=0,",
            "models/test_bsq_tokenizer.py::test_self_correction_flips_before_the_next_scale",
        ),
        ("(each - together)", "each", "models/test_bsq_tokenizer.py::test_losses_by_definition"),
    ],
    "fastvar/models/infinity.py": [
        (
            "positions[start : start + x.shape[1]]",
            "positions[: x.shape[1]]",
            "models/test_infinity_sampling.py::test_log_probs_are_those_of_training",
        ),
        (
            "if guided and against is None:",
            "if guided:",
            "models/test_infinity_sampling.py::test_guidance_on_logits",
        ),
        (
            "Head(self.logits(hidden))",
            "Head(hidden, self.head.weight, self.head.bias)",
            "rl/test_infinity_policy.py::test_bf16",
        ),
    ],
    "fastvar/models/infinity_block.py": [
        ("finest=rotation_grid(schedule)", "finest=None", "models/test_infinity_golden.py::test_logits"),
        ("torch.stack([weight - 1,", "torch.stack([0 * weight,", "models/test_infinity_golden.py::test_logits"),
    ],
    "fastvar/models/infinity_checkpoints.py": [
        (
            "copy=shared",
            "copy=False",
            "models/test_infinity_checkpoints.py::test_training_leaves_the_given_tensors_alone",
        ),
    ],
    "fastvar/models/var.py": [
        (
            "(k / (num_scales - 1) if num_scales > 1 else 1.0)",
            "((k + 1) / num_scales)",
            "models/test_var_sampling.py::test_guidance_of_one_number_grows_over_the_scales",
        ),
    ],
    "fastvar/models/next_scale.py": [
        (
            "= self.config.condition_dropout",
            "= 0.0",
            "models/test_infinity.py::test_texts_are_dropped_in_training",
        ),
        (
            "max(rate, 0.5))",
            "rate)",
            "models/test_infinity_subject.py::test_subjects_are_dropped_in_training",
        ),
        (
            "rope=rope, by_scale=by_scale)",
            "rope=rope)",
            "models/test_injections.py::test_what_an_image_sees_of_its_subject",
        ),
        (
            "return x, visible, positions.rope_of(start, schedule.num_tokens)",
            "return x, visible, None",
            "models/test_infinity_subject.py::test_the_prefix_has_the_positions_of_its_own_grids",
        ),
        (
            "told = modulations.map(lambda rows: rows[: len(rows) // 2])",
            "told = modulations.map(lambda rows: rows[len(rows) // 2 :])",
            "models/test_infinity_sampling.py::test_guidance_on_hidden_states[2]",
        ),
    ],
    "fastvar/models/t5.py": [
        ("attention_mask=mask.to(device)", "attention_mask=None", "models/test_text.py::test_t5"),
        (
            "ids[: self.max_length - 1] + ids[-1:]",
            "ids[: self.max_length]",
            "models/test_text.py::test_long_texts_are_cut",
        ),
    ],
    "fastvar/models/text.py": [
        ("attn_mask=text.valid", "attn_mask=None", "models/test_text.py::test_attention_reads_each_text_alone"),
    ],
    "fastvar/models/var_block.py": [
        (
            "if prefix.lengths is not None:",
            "if False:",
            "models/test_injections.py::test_dropped_subjects_are_not_seen",
            "models/test_injections.py::test_interleaved_attention_is_that_of_its_mask",
        ),
    ],
    "fastvar/models/sampling.py": [
        (
            "prefix_tokens=end if by_scale else None",
            "prefix_tokens=None",
            "models/test_injections.py::test_sampling_agrees_with_training",
        ),
        (
            "temperature=options.temperature[k]",
            "temperature=1.0",
            "models/test_var_sampling.py::test_options_that_leave_the_likeliest[{'temperature': 0.0001}]",
        ),
        (
            "temperature=options.temperature[k]",
            "temperature=options.temperature[0]",
            "models/test_infinity_sampling.py::test_temperature_by_scale",
        ),
        ("tile=options.decode_tile", "tile=None", "models/test_tiles.py::test_generated_pictures"),
        (
            "first_sample, model.device",
            "0, model.device",
            "models/test_infinity_sampling.py::test_a_sample_does_not_depend_on_its_batch",
        ),
        (
            "len(model.blocks) - state.guidance_layer",
            "len(model.blocks) - 1",
            "models/test_infinity_sampling.py::test_guidance_on_hidden_states[2]",
        ),
        (
            "top_k=options.top_k[k]",
            "top_k=0",
            "models/test_var_sampling.py::test_options_that_leave_the_likeliest[{'top_k': 1}]",
        ),
        (
            "top_p=options.top_p[k]",
            "top_p=1.0",
            "models/test_var_sampling.py::test_options_that_leave_the_likeliest[{'top_p': 1e-06}]",
        ),
        (
            "position=state.schedule.starts[k],",
            "position=0,",
            "models/test_var_sampling.py::test_every_scale_draws_numbers_of_its_own",
            "models/test_infinity_sampling.py::test_every_scale_draws_numbers_of_its_own",
        ),
        (" | (seed << 32)", "", "models/test_var_sampling.py::test_seeds"),
        (
            "torch.arange(first_sample, first_sample + count, device=device)",
            "torch.arange(count, device=device)",
            "models/test_var_sampling.py::test_a_sample_does_not_depend_on_its_batch",
        ),
        (
            "rows.repeat_interleave(times, 0)",
            "rows.repeat(times, *[1] * (rows.ndim - 1))",
            "models/test_var_sampling.py::test_forks_share_the_trunk_and_leave_it_alone",
        ),
        (
            '"guidance": self.guidance_of(model)',
            '"guidance": model.no_guidance',
            "test_evaluation.py::test_drawing",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        (
            "model.no_guidance if self.guidance is None",
            "0.0 if self.guidance is None",
            "models/test_next_scale.py::test_options_of_no_guidance",
        ),
        (
            '"temperature": self.temperature',
            '"temperature": 1.0',
            "test_evaluation.py::test_drawing",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        (
            '"top_k": self.top_k',
            '"top_k": 0',
            "test_evaluation.py::test_drawing",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        (
            '"top_p": self.top_p',
            '"top_p": 1.0',
            "test_evaluation.py::test_drawing",
            "rl/test_wiring.py::test_rollouts_are_drawn_as_told",
        ),
        ("lengths[:rows] = tokens", "lengths[:] = tokens", "models/test_var_sampling.py::test_guidance[block_causal]"),
        (
            "model.schedule, subject, guided, log_probs=False",
            "model.schedule, None, guided, log_probs=False",
            "rl/test_infinity_policy.py::test_the_reference_continues",
        ),
    ],
    "fastvar/data/folder.py": [
        (
            "v2.RandomCrop(size) if train",
            "v2.RandomCrop(size) if True",
            "data/test_folder.py::test_evaluation_is_the_centre_of_the_resized_image",
        ),
        (
            "if train and flip else []",
            "if train else []",
            "data/test_folder.py::test_training_crops_and_flips_at_random_from_torch_state",
        ),
        (
            "classes = list(wanted)",
            "classes = [name for name in wanted if name in classes]",
            "data/test_folder.py::test_labels_of_given_classes",
        ),
    ],
    "fastvar/data/metrics.py": [
        (
            "min(previous[column] + 1, current[-1] + 1,",
            "min(previous[column] + 1,",
            "data/test_metrics.py::test_edit_distance",
        ),
        ("z2 / (4 * trials**2)", "0", "data/test_metrics.py::test_wilson_interval"),
        ("stdev(sample) / math.sqrt(len(sample))", "stdev(sample)", "data/test_metrics.py::test_mean_interval"),
        ("(group_size * (group_size - 1))", "group_size**2", "data/test_metrics.py::test_diversity"),
    ],
    "fastvar/integrations/patching.py": [
        (
            "self.sampling and not torch.is_grad_enabled()",
            "self.sampling",
            "integrations/test_var.py::test_gradients_while_an_image_is_sampled",
        ),
        (
            'if why is None and hasattr(found, "cached_k")',
            'if False and hasattr(found, "cached_k")',
            "integrations/test_var.py::test_attention_of_a_fork_that_takes_more",
        ),
        ("vars(owner).pop(name, None)", "pass", "integrations/test_var.py::test_everything_is_restored"),
        (
            "if torch.equal(found, torch.where(seen, 0.0, -torch.inf).to(found.dtype)):",
            "if not diagonal:",
            "integrations/test_var.py::test_other_masks_are_left_to_the_model",
        ),
        (
            "if len(kept) != len(of) or any(a is not b for a, b in zip(kept, of, strict=True)):",
            "if True:",
            "integrations/test_var.py::test_it_reads_no_mask_and_keeps_one_cache",
        ),
        ("self._kept.clear()", "pass", "integrations/test_var.py::test_nothing_is_kept_from_image_to_image"),
        (
            "patch.surplus(found) < best.surplus(found)",
            "False",
            "integrations/test_hart.py::test_other_grids_are_the_former_methods",
        ),
    ],
    "fastvar/integrations/var.py": [
        ("elif known.caches and not plain:", "elif False:", "integrations/test_caching.py::test_masks_while_caching"),
        (
            "gated_residual_norm(x, self.drop_path(h), gate1",
            "gated_residual_norm(x, h, gate1",
            "integrations/test_wrapped.py::test_wrapped_models_learn_as_before",
        ),
        (
            "return self.proj_drop(self.proj(out.flatten(2)))",
            "return self.proj(out.flatten(2))",
            "integrations/test_wrapped.py::test_wrapped_models_learn_as_before",
        ),
        (
            "if cond_BD.ndim != 2:",
            "if False:",
            "integrations/test_var.py::test_conditions_of_each_token_are_the_former_methods",
        ),
        ("following.to(f_hat.dtype).mT", "following.mT", "integrations/test_switti.py::test_a_pipeline_in_bfloat16"),
        (
            "versions == _versions(known)",
            "True",
            "integrations/test_var.py::test_changed_tokens_have_their_own_inputs",
        ),
        ("max(capacity, end)", "end", "integrations/test_var.py::test_it_reads_no_mask_and_keeps_one_cache"),
        (
            "softmax_scale=attention.scale)",
            "softmax_scale=1.0)",
            "integrations/test_var.py::test_training_and_sampling_agree",
        ),
    ],
    "fastvar/integrations/hart.py": [
        (
            "gated_residual(x, self.drop_path(h), gate1)",
            "gated_residual(x, h, gate1)",
            "integrations/test_wrapped.py::test_wrapped_models_learn_as_before",
        ),
        (
            "_attend(q[:, end:], k, v,",
            "_attend(q[:, end:], k[:, :end], v[:, :end],",
            "integrations/test_hart.py::test_training_and_sampling_agree",
        ),
        (
            "m_maskgit), texts, m_maskgit)",
            "m_maskgit), texts)",
            "integrations/test_hart.py::test_training_and_sampling_agree",
        ),
    ],
    "fastvar/integrations/switti.py": [
        (
            "block_diagonal=diagonal)",
            "block_diagonal=False)",
            "integrations/test_switti.py::test_training_and_sampling_agree",
        ),
        (
            "torch.is_inference_mode_enabled()",
            "0",
            "integrations/test_switti.py::test_training_after_sampling",
        ),
    ],
    "fastvar/integrations/var_fork.py": [
        ("bound.apply_defaults()", "pass", "integrations/test_var.py::test_attention_of_a_fork_that_takes_more"),
        (
            "if any(not _same(",
            "if False and any(not _same(",
            "integrations/test_switti.py::test_noise_is_the_former_methods",
        ),
    ],
    "fastvar/integrations/samplers.py": [
        (
            "below if cell.cell_contents is decorated else cell for",
            "cell for",
            "integrations/test_var.py::test_decorators_of_methods_that_draw",
        ),
        ("given.apply_defaults()", "pass", "integrations/test_var.py::test_decorators_of_methods_that_draw"),
        ('.get("more_smooth"):', '.get("x"):', "integrations/test_var.py::test_smoothing_reads_truncated_logits"),
        ("drawn_by: draw}", "drawn_by: former}", "integrations/test_var.py::test_the_sampler_draws_by_the_operator"),
    ],
    "fastvar/integrations/corrected.py": [
        (
            "function.__globals__, function.__name__, function.__defaults__",
            "function.__globals__, function.__name__",
            "integrations/test_infinity.py::test_a_trainers_loss",
        ),
        (
            "if _known_by(same) != _known_by(function.__code__):",
            "if False:",
            "integrations/test_infinity.py::test_a_trainers_loss_is_left",
        ),
    ],
    "fastvar/integrations/infinity.py": [
        (
            "gated_residual(x, self.drop_path(h), gate1)",
            "gated_residual(x, h, gate1)",
            "integrations/test_wrapped.py::test_wrapped_models_learn_as_before",
        ),
        (
            "x, eps = x.float(), self.norm_eps",
            "x, eps = x, self.norm_eps",
            "integrations/test_infinity.py::test_a_block_in_16_bits",
        ),
        (
            "with torch.autocast(x.device.type, enabled=False):",
            "if True:",
            "integrations/test_infinity.py::test_a_block_in_16_bits",
        ),
        ("start = filled(self)", "start = 0", "integrations/test_infinity.py::test_a_forgotten_scale_does_no_harm"),
        ("k < self.noise_apply_layers", "True", "integrations/test_infinity.py::test_which_scales_have_flips"),
        (
            "if self.checkpointing_sa_only and self.training:",
            "if False:",
            "integrations/test_infinity.py::test_checkpoints_of_attention_alone",
        ),
        (
            "if q.shape[2] < k.shape[2]:",
            "if False:",
            "integrations/test_infinity.py::test_attention_by_schedule_of_models_made_for_flex_attention",
        ),
    ],
    "fastvar/integrations/shims.py": [
        (
            '"rms_norm": "rms_norm_into"',
            '"rms_norm": "rms_norm"',
            "integrations/test_shims.py::test_imports_find_them_on_request_only",
        ),
        (
            "if inner and not _is_ours(sys.modules.get(package)):",
            "if False:",
            "integrations/test_shims.py::test_a_real_package_is_never_hidden",
        ),
    ],
    "fastvar/training/sharded.py": [
        (
            "local(own).copy_(local(theirs))",
            "local(own).zero_()",
            "rl/test_rl_processes.py::test_accelerates_own_plugin",
        ),
        (
            "return tree_map_only(nn.Parameter, torch.clone, answer)",
            "return answer",
            "rl/test_rl_processes.py::test_accelerates_own_plugin",
        ),
        (
            "whole.requires_grad_(False).train(copy.training)",
            "whole",
            "rl/test_rl_processes.py::test_sharded_supervised_training",
        ),
        (
            "sorted({type(block).__name__ for block in blocks})",
            "[]",
            "rl/test_rl_processes.py::test_accelerates_own_plugin",
        ),
    ],
    "fastvar/evaluation.py": [
        ("            seed=seed,\n", "            seed=0,\n", "test_evaluation.py::test_drawing"),
        ("first_sample=first_sample + start", "first_sample=first_sample", "test_evaluation.py::test_drawing[2]"),
        (
            "first_sample=first_sample + start",
            "first_sample=start",
            "image_benchmarks/test_drawing.py::test_images_of_classes",
        ),
        ('"ned": self.similarity,', '"ned": self.accuracy,', "test_evaluation.py::test_reading"),
    ],
    "fastvar/handwriting/evaluation.py": [
        ("i * total // count", "i", "handwriting/test_evaluation.py::test_numbers_are_spread_over_all"),
    ],
    "hub/build.py": [
        (
            "f'NAMESPACE = \"{identity}\"'",
            "'NAMESPACE = \"fastvar\"'",
            "test_hub.py::test_two_builds_and_fastvar_in_one_process",
        ),
        ("{'.' * depth}{inner}", "{'.' * depth}fastvar.{inner}", "test_hub.py::test_what_cannot_be_rewritten_is_named"),
    ],
    "examples/cross_entropy_in_your_trainer.py": [
        ("total = total / tokens.shape[2]", "pass", "test_examples.py::test_cross_entropy_of_bits"),
    ],
    "examples/patch_public_checkout.py": [
        ("rate, var.cond_drop_rate =", "rate, _ =", "test_examples.py::test_patch_public_checkout"),
    ],
    "examples/policy_loss_in_trl.py": [
        ("self._check(inputs)", "pass", "test_examples.py::test_policy_loss_in_trl"),
        ("token_mask=mask.bool(),", "", "test_examples.py::test_policy_loss_in_trl"),
        ("temperature=self.temperature,", "", "test_examples.py::test_policy_loss_in_trl"),
    ],
    "fastvar/report.py": [
        ("<p>{html.escape(text)}</p>", "<p>{text}</p>", "test_report.py::test_page"),
        ("<td>{html.escape(str(c))}</td>", "<td>{c}</td>", "test_report.py::test_page"),
        (
            "for line in lines if metric in line",
            "for line in lines[:1] if metric in line",
            "test_report.py::test_a_curve_skips_lines_without_its_metric",
        ),
    ],
    "fastvar/image_benchmarks/geneval.py": [
        ("[:MOST]", "[:1]", "image_benchmarks/test_geneval.py::test_what_is_looked_at"),
        ("if one.score > least", "if one.score > SURE", "image_benchmarks/test_geneval.py::test_figures_by_hand"),
        ("max(abs(offset) - SLACK * sides, 0.0)", "abs(offset)", "image_benchmarks/test_geneval.py::test_positions"),
        (
            "torch.where(mask.to(image.device), image,",
            "torch.where(mask | True, image,",
            "image_benchmarks/test_geneval.py::test_what_clip_sees",
        ),
    ],
    "fastvar/image_benchmarks/detection.py": [
        ("sure = score * float(", "sure = score + 0 * float(", "image_benchmarks/test_geneval.py::test_mask2former"),
    ],
    "fastvar/rl/rewards/readers.py": [
        ("[] if found.txts is None else zip(", "zip(", "rl/test_readers.py::test_rapidocr"),
        (
            "found = self._reader(image[..., ::-1].copy())",
            "found = self._reader(image)",
            "rl/test_readers.py::test_rapidocr",
        ),
    ],
}
FAULTS = tuple(
    Fault(file, old, new, tuple(f"tests/{test}" for test in tests))
    for file, faults in _PLANTED.items()
    for old, new, *tests in faults
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
