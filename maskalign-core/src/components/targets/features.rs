//! A teacher's hidden states.

use maskalign_engine::{Context, Result, Tape, Tensor, ops};
use maskalign_registry::{LevelRef, Levels, Refusal};

use super::{Normalize, PlannedTarget, Target, TargetContext, TargetInput, TargetSource, TeacherTarget};
use crate::{
    component,
    components::{
        teachers::{Level, TeacherModel},
        towers::Tap,
    },
    register,
};

/// Whether levels stay apart.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Combine {
    /// One output per level.
    #[default]
    None,
    /// The mean of the levels, after normalising.
    Mean,
}

/// The hidden states of a teacher (MaskAlign, arXiv 2211.08887, section 3).
#[component]
struct Features {
    /// The teacher, by its name under `teachers`.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// Levels: `all`, `{last: K}`, or a list of 0-based blocks, negative from the end.
    #[serde(default)]
    levels: Levels,
    /// Where the states are taken.
    #[serde(default)]
    tap: Tap,
    /// How each level is normalised.
    #[serde(default)]
    normalize: Normalize,
    /// Whether levels stay apart or are averaged.
    #[serde(default)]
    combine: Combine,
    /// How the mean of the levels is normalised once more (data2vec's last LayerNorm).
    #[serde(default)]
    normalize_mean: Normalize,
}

impl Target for Features {
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
        let teacher = cx.teacher(&self.teacher)?;
        let levels = self.levels.resolve(teacher.arch.depth).map_err(|r| r.under("levels"))?;
        let levels: Vec<usize> = levels
            .into_iter()
            .enumerate()
            .map(|(at, level)| match level {
                LevelRef::Block(i) => Ok(i),
                LevelRef::Embed => {
                    let message = "a target is taken after a block; `embed` is the student's";
                    Err(Refusal::new(at.to_string(), message).under("levels"))
                }
            })
            .collect::<Result<_, _>>()?;
        cx.check_tokens(&self.teacher, teacher)?;
        if self.normalize_mean != Normalize::None && self.combine == Combine::None {
            return Err(Refusal::new("normalize_mean", "there is no mean: the levels stay apart")
                .related(["combine"], "`mean` averages them")
                .help("set `combine: mean`, or leave `normalize_mean` out"));
        }
        if self.normalize_mean.needs_every_token() {
            let message = "only the compared tokens have a mean, and `standardize_batch` is of all tokens";
            return Err(
                Refusal::new("normalize_mean", message).help("each token by itself: `whiten`, `standardize` or `l2`")
            );
        }
        teacher.check_tap(&format!("`{}`", self.teacher), self.tap)?;
        let width = match (self.tap, teacher.projection) {
            (Tap::Projection, Some(width)) => width,
            (Tap::Projection, None) => {
                return Err(Refusal::new("tap", format!("`{}` has no projection", self.teacher)));
            }
            _ => teacher.arch.dim,
        };
        Ok(PlannedTarget {
            outputs: if self.combine == Combine::Mean { 1 } else { levels.len() },
            depth: teacher.arch.depth,
            levels,
            width,
            source: TargetSource::Teacher {
                name: self.teacher.clone(),
                tap: self.tap,
                whole: self.normalize.needs_every_token(),
                target: Box::new(PlannedFeatures {
                    tap: self.tap,
                    normalize: self.normalize,
                    combine: self.combine,
                    normalize_mean: self.normalize_mean,
                }),
            },
        })
    }
}

/// What the teacher's states go through.
struct PlannedFeatures {
    tap: Tap,
    normalize: Normalize,
    combine: Combine,
    normalize_mean: Normalize,
}

impl TeacherTarget for PlannedFeatures {
    fn outputs(
        &self,
        cx: &Context,
        input: &TargetInput,
        teacher: &dyn TeacherModel,
        levels: &[&Level],
    ) -> Result<Vec<Tensor>> {
        let off = &mut Tape::inference();
        let whole = self.normalize.needs_every_token();
        let mut outputs = Vec::with_capacity(levels.len());
        for level in levels {
            let mut x = level.x.clone();
            // Statistics of a token are its own: gathering first is the same and less work. Those of the batch are not.
            if whole {
                x = self.normalize.apply(cx, &teacher.tap(cx, &x, self.tap)?)?;
            }
            let rows = match level.only {
                Some(held) => input.masks.within(input.tokens, held),
                None => {
                    let shape = teacher.shape();
                    Some(input.masks.rows_among(input.tokens, shape.cls_token, shape.tokens()))
                }
            };
            if let Some(rows) = rows {
                x = ops::gather_rows(cx, off, &[&x], &rows)?;
            }
            if !whole {
                x = self.normalize.apply(cx, &teacher.tap(cx, &x, self.tap)?)?;
            }
            outputs.push(x);
        }
        if self.combine == Combine::Mean {
            let share = vec![1.0 / outputs.len() as f32; outputs.len()];
            let mean = ops::weighted_mean(cx, &outputs.iter().collect::<Vec<_>>(), &share)?;
            outputs = vec![self.normalize_mean.apply(cx, &mean)?];
        }
        Ok(outputs)
    }
}

register!(target "features" => Features, "the hidden states of a teacher",
    example: "{ type: features, teacher: clip, levels: { last: 5 }, normalize: whiten }",
    paper: "MaskAlign, arXiv 2211.08887, section 3");
