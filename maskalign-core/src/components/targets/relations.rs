//! Relations of tokens inside a teacher's block.

use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, flat_rows},
};
use maskalign_registry::{Refusal, block_index};

use super::{PlannedTarget, Target, TargetContext, TargetInput, TargetSource, TeacherTarget};
use crate::{
    component,
    components::{
        relations::{Relation, Relations},
        teachers::{Level, TeacherModel},
        towers::Tap,
    },
    register,
};

fn last() -> i64 {
    -1
}

fn attention_and_values() -> Vec<Relation> {
    vec![Relation::Qk, Relation::Vv]
}

/// What each compared token is to each of them inside a block of a teacher: scaled products of queries, keys and values by
/// head, before the softmax that `loss: {type: kl}` takes of them (MiniLM, arXiv 2002.10957; TinyMIM, arXiv 2301.01296). They do
/// not depend on a tower's width. Of the teacher, only what these need is computed.
#[component]
struct RelationsTarget {
    /// The teacher, by its name under `teachers`.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// The teacher's block, counted from 0, or from the end where it is negative.
    #[serde(default = "last")]
    level: i64,
    /// What is compared with what, an output each: `qk` is the block's attention.
    #[serde(default = "attention_and_values")]
    #[schemars(length(min = 1))]
    of: Vec<Relation>,
    /// Heads that both towers' channels are cut into (MiniLMv2's relation heads, arXiv 2012.15828), whatever the attention's
    /// are. Absent: as many as the teacher's attention has.
    #[serde(default)]
    #[schemars(range(min = 1))]
    heads: Option<usize>,
}

impl RelationsTarget {
    fn check_heads(&self, heads: usize, cx: &TargetContext, teacher: usize) -> Result<(), Refusal> {
        for (whose, dim, of_student) in
            [(format!("`{}`", self.teacher), teacher, false), ("the student".to_owned(), cx.student.arch.dim, true)]
        {
            if !dim.is_multiple_of(heads) {
                let message = format!("{heads} heads do not divide the {dim} channels of {whose}");
                let refusal = Refusal::new("heads", message);
                return Err(match of_student {
                    true => refusal.in_stage(["student", "arch"], "the student's channels"),
                    false => refusal.in_stage(["teachers", &self.teacher, "arch"], "the teacher's channels"),
                }
                .help("set `heads` to a divisor of both towers' channels"));
            }
        }
        Ok(())
    }
}

impl Target for RelationsTarget {
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
        let teacher = cx.teacher(&self.teacher)?;
        let block = block_index(self.level, teacher.arch.depth).map_err(|says| Refusal::new("level", says))?;
        for (i, relation) in self.of.iter().enumerate() {
            if self.of[..i].contains(relation) {
                return Err(Refusal::new(i.to_string(), "named twice").under("of"));
            }
        }
        let heads = self.heads.unwrap_or(teacher.arch.heads);
        self.check_heads(heads, cx, teacher.arch.dim)?;
        cx.check_tokens(&self.teacher, teacher)?;
        Ok(PlannedTarget {
            outputs: self.of.len(),
            depth: teacher.arch.depth,
            levels: vec![block],
            width: cx.tokens.count(cx.counts.visible, cx.counts.masked),
            source: TargetSource::Teacher {
                name: self.teacher.clone(),
                tap: Tap::Block,
                whole: false,
                target: Box::new(PlannedRelations(Relations { of: self.of.clone(), heads })),
            },
        })
    }
}

/// Relations whose heads divide both towers' channels.
struct PlannedRelations(Relations);

impl TeacherTarget for PlannedRelations {
    fn relations(&self) -> Option<&Relations> {
        Some(&self.0)
    }

    fn outputs(
        &self,
        cx: &Context,
        input: &TargetInput,
        teacher: &dyn TeacherModel,
        levels: &[&Level],
    ) -> Result<Vec<Tensor>> {
        let (off, shape) = (&mut Tape::inference(), teacher.shape());
        let rows = flat_rows(&input.masks.rows(input.tokens, shape.cls_token), input.masks.batch, shape.tokens());
        let mut outputs = Vec::new();
        for level in levels {
            let qkv = ops::gather_rows(cx, off, &[&level.x], &rows)?;
            outputs.extend(self.0.logits(cx, off, &qkv, input.masks.batch)?);
        }
        Ok(outputs)
    }
}

register!(target "relations" => RelationsTarget, "relations of a teacher's tokens inside a block",
    example: "{ type: relations, teacher: mae, level: -1, of: [qk, vv] }",
    paper: "MiniLM, arXiv 2002.10957; TinyMIM, arXiv 2301.01296");
