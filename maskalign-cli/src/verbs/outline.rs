//! What a recipe trains, as the head of a run and `validate` show it.

use maskalign_core::stages::{OutlineLine, outline};
use maskalign_registry::Recipe;

use crate::render::{self, paint};

/// The stages in order, each with its student, teachers, masker and objectives: two columns under each stage's name.
pub(super) fn text(recipe: &Recipe) -> String {
    let label = |line: &OutlineLine| match &line.name {
        Some(name) => format!("{} {name}", line.part),
        None => line.part.to_owned(),
    };
    let stages: Vec<(&String, &str, Vec<OutlineLine>)> =
        recipe.stages.iter().map(|(name, slot)| (name, slot.name.as_str(), outline(slot))).collect();
    let lines = stages.iter().flat_map(|(_, _, lines)| lines);
    let width = lines.map(|line| label(line).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, kind, lines) in &stages {
        let kind = if name == kind { String::new() } else { format!(" ({kind})") };
        text.push_str(&format!("  {}{kind}\n", paint(render::STRONG, name)));
        for line in lines {
            text.push_str(&format!("    {:<width$}  {}\n", label(line), line.says));
        }
    }
    text
}
