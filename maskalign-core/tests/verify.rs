//! Steps recorded from the PyTorch implementation, replayed by the stage's own step.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use dfdx::prelude::Cpu;
use maskalign_core::{
    context::Context,
    kernels::{Kernels, composed::Composed},
    verify::{Case, CaseReport},
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry};

fn cases() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/cases");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    cases.sort();
    cases
}

fn replay(cx: &Context<Cpu>, path: &Path, sets: &[&str]) -> CaseReport {
    let case = Case::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let teacher = folder.path().join("teacher.safetensors");
    case.write_teacher(&teacher).unwrap();
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let request = LoadRequest {
        input: Input::Text { name: "case".into(), text: case.recipe(&teacher) },
        sets: &sets,
        env: &|_| None,
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, Registry::global().unwrap()).unwrap_or_else(|r| panic!("{}", r.render()));
    case.replay(cx, loaded.recipe()).unwrap()
}

fn contexts() -> Vec<Context<Cpu>> {
    let composed: Arc<dyn Kernels<Cpu>> = Arc::new(Composed::new(2));
    vec![
        Context { dev: Cpu::default(), kernels: composed.clone(), recompute: false },
        Context { dev: Cpu::default(), kernels: composed, recompute: true },
        Context::new(Cpu::default(), 2, false),
        Context::new(Cpu::default(), 1, true),
    ]
}

#[test]
fn every_recorded_quantity_agrees_within_1e_4() {
    let cases = cases();
    assert_eq!(cases.len(), 9);
    for path in cases {
        for cx in contexts() {
            let report = replay(&cx, &path, &[]);
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            for q in &report.quantities {
                println!(
                    "{name} {} recompute {}: {} {:.1e} ({} of {})",
                    cx.kernels.name(),
                    cx.recompute,
                    q.name,
                    q.error,
                    q.worst,
                    q.tensors
                );
            }
            assert!(report.error() < 1e-4, "{name}: {:.1e}", report.error());
        }
    }
}

/// A step that differs from the official one in any of these must not pass for it.
#[test]
fn a_wrong_recipe_fails() {
    let case = cases().into_iter().find(|p| p.ends_with("paper_default.safetensors")).unwrap();
    let cx = Context::new(Cpu::default(), 1, false);
    for set in [
        "stages.pretrain.objectives.align.aligner.fusion=simple",
        "stages.pretrain.objectives.align.target.normalize=none",
        "stages.pretrain.optimizer.weight_decay=0.0",
        "stages.pretrain.optimizer.no_decay=[]",
        "stages.pretrain.optimizer.eps=1e-6",
        "stages.pretrain.teachers.teacher.activation=gelu",
        "stages.pretrain.student.eps=1e-5",
    ] {
        let error = replay(&cx, &case, &[set]).error();
        assert!(error > 1e-4, "`{set}` passes with {error:.1e}");
    }
}
