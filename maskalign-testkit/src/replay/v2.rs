//! The format `maskalign-case-v2`: steps of any recipe.

use std::collections::BTreeMap;

use maskalign_core::{ImageBatch, weights::TensorMap};

use super::{
    Case, Kept,
    parts::{Ids, Malformed, Parts},
};

/// Reads what a file of this format holds.
pub(super) fn read(mut parts: Parts) -> Result<Case, Malformed> {
    let recipe = parts.metadata("recipe")?;
    let images = parts.images("images")?;
    let mut crops = Vec::new();
    while parts.has(&format!("images.{}", crops.len() + 1)) {
        crops.push(parts.images(&format!("images.{}", crops.len() + 1))?);
    }
    let (lr, losses) = (parts.take("lr")?.data, parts.take("expect.loss")?.data);
    let (steps, batch) = (lr.len(), images[0].batch);
    let mut side = |name| parts.has(name).then(|| parts.ids(name)).transpose();
    let (visible, masked) = (side("visible")?, side("masked")?);
    let mut further_masked = Vec::new();
    while parts.has(&format!("masked.{}", further_masked.len() + 1)) {
        further_masked.push(parts.ids(&format!("masked.{}", further_masked.len() + 1))?);
    }
    let fits = |ids: &Ids| (ids.steps, ids.batch) == (steps, batch);
    let is_whole = |crop: &Vec<ImageBatch>| [1, steps].contains(&crop.len()) && crop[0].batch == batch;
    if steps == 0 || losses.len() != steps || !is_whole(&images) || !crops.iter().all(is_whole) {
        return Err(Malformed(format!(
            "{steps} rates, {} losses and images of {} steps do not fit together",
            losses.len(),
            images.len()
        )));
    }
    if !visible.iter().chain(&masked).chain(&further_masked).all(fits) {
        return Err(Malformed(format!("`visible` and `masked` are of {steps} steps and {batch} images each")));
    }
    let steps_per_epoch = match parts.note("steps_per_epoch") {
        None => steps as u64,
        Some(text) => text
            .parse::<u32>()
            .ok()
            .filter(|&steps| steps > 0)
            .map(u64::from)
            .ok_or_else(|| Malformed(format!("`steps_per_epoch` is `{text}`, not a whole number above 0")))?,
    };
    let mut teachers = BTreeMap::new();
    for (name, tensor) in parts.under("teacher.") {
        // The first part becomes the name of a file.
        let is_plain =
            |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        let Some((teacher, name)) = name.split_once('.').filter(|(teacher, _)| is_plain(teacher)) else {
            return Err(Malformed(format!("`teacher.{name}` is not named teacher.TEACHER.TENSOR")));
        };
        teachers.entry(teacher.to_owned()).or_insert_with(TensorMap::new).insert(name.to_owned(), tensor);
    }
    let (start, expected) = (parts.under("start."), parts.under("expect."));
    let is_known = |name: &&String| {
        let is_step = |rest: &str| {
            rest.split_once('.').is_some_and(|(step, _)| step.parse().is_ok_and(|step: usize| step < steps))
        };
        ["grad.", "param.", "term."].iter().any(|prefix| name.starts_with(prefix))
            || name.as_str() == "progress"
            || name.strip_prefix("moving.").is_some_and(is_step)
    };
    if let Some(name) = expected.keys().find(|name| !is_known(name)) {
        return Err(Malformed(format!("it has a tensor `expect.{name}`, which means nothing")));
    }
    if let Some(name) = parts.left() {
        return Err(Malformed(format!("it has a tensor `{name}`, which means nothing")));
    }
    Ok(Case {
        recipe,
        teachers,
        images,
        crops,
        visible,
        masked,
        further_masked,
        lr,
        steps_per_epoch,
        start,
        losses,
        kept: Kept::All,
        expected,
    })
}
