//! What `validate` says a stage will need, against what the process had at most.

use crate::support::Sandbox;
use serde_json::Value;

/// The estimate and the measured peak of a recipe of one stage, in MiB. The sizes make the step outweigh the program.
fn compare(recipe: &str, overrides: &[&str], flags: &[&str]) {
    compare_in(&Sandbox::new(), recipe, overrides, flags);
}

#[expect(clippy::print_stdout, reason = "the ratio is worth a look where the test passes too")]
fn compare_in(sandbox: &Sandbox, recipe: &str, overrides: &[&str], flags: &[&str]) {
    let sets = overrides.iter().flat_map(|o| ["--set", o]);
    let validate: Vec<&str> = ["validate", recipe, "--format", "json"].into_iter().chain(sets.clone()).collect();
    let output = sandbox.run(validate.iter().chain(flags));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let report: Value = serde_json::from_slice(&output.stdout).expect("json");
    let stages = report["recipes"][0]["stages"].as_object().expect("stages");
    let estimate =
        stages.values().map(|s| s["memory"].as_f64().expect("bytes")).fold(0.0, f64::max) / f64::from(1 << 20);

    let _ = std::fs::remove_dir_all(sandbox.work().join("run"));
    let run: Vec<&str> = ["run", recipe, "--steps", "2", "-q", "--out", "run"].into_iter().chain(sets).collect();
    let output = sandbox.run(run.iter().chain(flags));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = std::fs::read_to_string(sandbox.work().join("run/manifest.json")).expect("manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("json");
    let measured = manifest["peak_memory_mib"].as_f64().expect("Linux tells");
    let ratio = estimate / measured;
    println!(
        "{recipe} {overrides:?} {flags:?}: estimate {estimate:.0} MiB, measured {measured:.0} MiB, ratio {ratio:.2}"
    );
    assert!(
        (0.75..=1.25).contains(&ratio),
        "{recipe} {overrides:?}: {estimate:.0} MiB said, {measured:.0} MiB measured"
    );
}

#[test]
fn pre_training_with_a_teacher() {
    compare("quickstart", &["~stages.knn", "stages.pretrain.batch={effective: 1024}"], &[]);
}

#[test]
fn recomputation() {
    let deep = "stages.pretrain.student.arch={dim: 192, depth: 12, heads: 3, patch: 4}";
    compare("quickstart", &["~stages.knn", "stages.pretrain.batch={effective: 512}", deep], &["--recompute"]);
}

#[test]
fn a_decoder_over_mask_tokens() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student={type: vit, arch: {dim: 96, depth: 4, heads: 3, patch: 4}}",
        "stages.pretrain.objectives.pixels.aligner={type: decoder, dim: 96, depth: 2, heads: 3}",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("mae_vitb", &sample, &[]);
}

#[test]
fn fine_tuning() {
    let sample = [
        "~stages.knn",
        "stages.train.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.train.batch={effective: 512}",
    ];
    compare("quickstart_teacher", &sample, &[]);
}

#[test]
fn a_linear_probe() {
    let sample = [
        "~stages.probe.eval",
        "stages.probe.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.probe.student={type: vit, arch: {dim: 192, depth: 6, heads: 3, patch: 4}}",
        "stages.probe.batch={effective: 1024}",
    ];
    compare("linear_probe_vitb", &sample, &[]);
}

#[test]
fn a_moving_average_as_the_teacher() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student={type: vit, arch: {dim: 96, depth: 6, heads: 3, patch: 4}, masked_patches: mask_token}",
        "stages.pretrain.masker={type: block, masked: 30, min_block: 4}",
        "stages.pretrain.schedule.min_lr=0",
        "stages.pretrain.schedule.warmup_lr=0",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("data2vec_vitb", &sample, &[]);
}

#[test]
fn several_views_and_a_head_of_prototypes() {
    let crop = |size: usize| format!("transforms: [{{type: random_resized_crop, size: {size}}}]");
    let data = format!(
        "stages.pretrain.data={{dataset: {{type: sample, split: train}}, views: {{global_1: {{{}}}, global_2: {{{}}}, \
         local: {{count: 4, {}}}}}}}",
        crop(28),
        crop(28),
        crop(12)
    );
    let sample = [
        data.as_str(),
        "stages.pretrain.student.arch={dim: 192, depth: 6, heads: 3, patch: 4}",
        "stages.pretrain.objectives.cls.target.prototypes=2048",
        "stages.pretrain.objectives.patches.target.prototypes=2048",
        "stages.pretrain.objectives.cls.aligner.hidden=512",
        "stages.pretrain.schedule.min_lr=0",
        "stages.pretrain.batch={effective: 64}",
    ];
    compare("attmask_vits", &sample, &[]);
}

#[test]
fn several_decoders() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student.arch={dim: 96, depth: 12, heads: 3, patch: 4}",
        "stages.pretrain.objectives.finest.target.cell=1",
        "stages.pretrain.objectives.fine.target.cell=2",
        "stages.pretrain.objectives.coarse.target.cell=4",
        "stages.pretrain.objectives.last.target.cell=4",
        "stages.pretrain.objectives.finest.aligner.dim=96",
        "stages.pretrain.objectives.fine.aligner.dim=96",
        "stages.pretrain.objectives.coarse.aligner.dim=96",
        "stages.pretrain.objectives.last.aligner.dim=96",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("vitfreeze_vitb", &sample, &[]);
}

#[test]
fn two_teachers() {
    let tower =
        "{type: vit, arch: {dim: 96, depth: 6, heads: 3, patch: 4}, weights: \"embedded://quickstart_teacher\"}";
    let teachers = format!("stages.pretrain.teachers={{clip: {tower}, mae: {tower}}}");
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student.arch={dim: 96, depth: 6, heads: 3, patch: 4}",
        teachers.as_str(),
        "stages.pretrain.schedule.min_lr=0",
        "stages.pretrain.schedule.warmup_lr=0",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("hybrid_distill_vitb", &sample, &[]);
}

#[test]
fn a_teacher_that_is_an_untrained_student() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student.arch={dim: 96, depth: 6, heads: 3, patch: 4}",
        "stages.pretrain.objectives.features.aligner={type: decoder, dim: 96, depth: 2, heads: 3}",
        "stages.pretrain.batch={effective: 512}",
        "~stages.second",
    ];
    compare("dbot_vitb", &sample, &[]);
}

#[test]
fn relations_of_tokens() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student.arch={dim: 96, depth: 4, heads: 3, patch: 4}",
        "stages.pretrain.teachers.mae={type: vit, arch: {dim: 96, depth: 6, heads: 3, patch: 4}, \
         weights: \"embedded://quickstart_teacher\"}",
        "stages.pretrain.objectives.relations.target={type: relations, teacher: mae, level: 4, heads: 12}",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("tinymim_vitb", &sample, &[]);
}

#[test]
fn a_target_of_gradients() {
    let sample = [
        "stages.pretrain.data={dataset: {type: sample, split: train}, transforms: []}",
        "stages.pretrain.student.arch={dim: 96, depth: 6, heads: 3, patch: 4}",
        "stages.pretrain.masker={type: block, masked: 20, min_block: 4}",
        "stages.pretrain.objectives.gradients.target.cell=2",
        "stages.pretrain.batch={effective: 512}",
    ];
    compare("maskfeat_vitb", &sample, &[]);
}

/// The sample's larger part is what is classified: that is what memory is for.
#[test]
fn nearest_neighbours() {
    let stages = "stages={knn: {type: knn, train: {dataset: {type: sample, split: test}}, \
                  test: {dataset: {type: sample, split: train}}, baselines: [pixels]}}";
    compare("quickstart", &[stages], &[]);
}

#[test]
fn nearest_neighbours_at_every_level() {
    let tower = "{type: finetune, epochs: 1, data: {dataset: {type: sample, split: test, limit: 10}}, optimizer: {type: adamw, \
                 base_lr: 0.001}, schedule: {type: constant}, batch: {effective: 2}, \
                 student: {type: vit, arch: {dim: 384, depth: 6, heads: 6, patch: 7}}}";
    let stages = format!(
        "stages={{tower: {tower}, knn: {{type: knn, train: {{dataset: {{type: sample, split: test, limit: 300}}}}, \
         test: {{dataset: {{type: sample, split: train}}}}, student: {{stage: tower}}, levels: {{last: 4}}, k: [200]}}}}"
    );
    compare("quickstart", &[&stages], &[]);
}

#[test]
fn retrieval() {
    let stages = "stages={retrieval: {type: retrieval, gallery: {dataset: {type: sample, split: train}}, \
                  queries: {dataset: {type: sample, split: test}}, baselines: [pixels]}}";
    compare("quickstart", &[stages], &[]);
}

#[test]
fn classification_from_few_images() {
    let stage = "type: few_shot, shots: [150], shares: [], penalty: 100, train: {dataset: {type: sample, split: train}}, \
                 test: {dataset: {type: sample, split: test}}, baselines: [pixels]";
    compare("quickstart", &[&format!("stages={{few: {{{stage}}}}}")], &[]);
}

/// A sandbox with a run `t` of a few steps, whose student judging stages take: their own peak is measured then.
fn with_a_classifier() -> Sandbox {
    let sandbox = Sandbox::new();
    let sets = [
        "~stages.knn",
        "~stages.train.eval",
        "stages.train.student={type: vit, arch: {dim: 384, depth: 6, heads: 6, patch: 4}}",
        "stages.train.data={dataset: {type: sample, split: test, limit: 40}, transforms: []}",
        "stages.train.batch={effective: 8}",
    ];
    let run = ["run", "quickstart_teacher", "--steps", "1", "-q", "--out", "t"];
    let output = sandbox.run(run.into_iter().chain(sets.iter().flat_map(|set| ["--set", set])));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    sandbox
}

#[test]
fn an_evaluation() {
    let sandbox = with_a_classifier();
    for batch in [200, 400] {
        let stages = format!(
            "stages={{judge: {{type: evaluate, classifier: {{type: vit, weights: t}}, batch: {batch}, \
             data: {{dataset: {{type: sample, split: test}}}}}}}}"
        );
        compare_in(&sandbox, "quickstart", &[&stages], &[]);
    }
}

#[test]
fn quality_without_labels() {
    let sandbox = with_a_classifier();
    let stages = "stages={quality: {type: quality, student: {type: vit, weights: t}, levels: {last: 3}, \
                  data: {dataset: {type: sample, split: test}}}}";
    compare_in(&sandbox, "quickstart", &[stages], &[]);
}
