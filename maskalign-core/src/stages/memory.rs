//! Estimates of peak memory, before the first step.

use super::StagePlan;
use crate::{components::towers::TowerShape, nn::Arch};

/// Bytes of a value.
pub(super) const FLOAT: u64 = 4;

/// Bytes for weights, gradients, two moments, and a student's activations over `rows` tokens.
pub(super) fn training(plan: &StagePlan, rows: usize, arch: Arch, recompute: bool) -> u64 {
    let (rows, dim, mlp, depth) = (rows as u64, arch.dim as u64, arch.mlp as u64, arch.depth as u64);
    let kept = if recompute { dim } else { dim * 6 + mlp };
    // What the backward pass of one block holds besides: its input's and output's gradients and its own temporaries.
    let passing = rows * (6 * dim + 2 * mlp);
    FLOAT * (plan.parameters as u64 + 3 * plan.trainable as u64 + depth * rows * kept + passing) + BASE
}

/// Bytes for a frozen tower: packed weights, and the states of a pass over `images` images.
pub(super) fn frozen(tower: &TowerShape, images: usize) -> u64 {
    let (dim, mlp, depth) = (tower.arch.dim as u64, tower.arch.mlp as u64, tower.arch.depth as u64);
    let weights = depth * (4 * dim * dim + 2 * dim * mlp) + dim * 3 * (tower.arch.patch as u64).pow(2);
    let rows = (images * tower.tokens()) as u64;
    FLOAT * (weights + rows * (5 * dim + mlp + 3 * dim))
}

/// The program itself and its buffers.
const BASE: u64 = 48 << 20;
