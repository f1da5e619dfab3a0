//! Classifiers' heads in files: a linear layer, and what stands before it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    TensorMap, WeightsError,
    checkpoint::CheckpointHeader,
    families::{to_canonical, unwrapped},
    naming::Family,
    read::{LEFT, read_shapes_with_head, read_with_head, weights_file},
};

/// Ends of the names of a head's last layer, without `weight`: timm's and MAE's, one behind a BatchNorm (MAE's and our linear
/// probes), Hugging Face's.
const LAYERS: [&str; 3] = ["head.", "head.1.", "classifier."];
/// What stands before the second of them.
const BATCH_NORM: &str = "head.0.";
/// The norm of averaged tokens.
const FC_NORM: &str = "fc_norm.";

/// A classifier's head in a file, known by names and shapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The file.
    pub file: PathBuf,
    /// Classes that it tells apart.
    pub classes: usize,
    /// Width of what it reads.
    pub width: usize,
    /// Whether a norm of averaged tokens stands before it (`fc_norm`).
    pub has_norm: bool,
    /// Whether running statistics stand before it (a BatchNorm without scale and shift).
    pub has_statistics: bool,
    /// Whether a run of this program left it.
    pub of_run: bool,
    key: Option<String>,
    names: Names,
}

/// Names of a head's tensors in a file, without what programs put around modules.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Names {
    weight: String,
    bias: Option<String>,
    /// Weight and bias.
    norm: Option<[String; 2]>,
    /// Mean and variance.
    statistics: Option<[String; 2]>,
}

/// The values of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadTensors {
    /// `[classes, width]`.
    pub weight: Vec<f32>,
    /// `[classes]`; zeros where the file has none.
    pub bias: Vec<f32>,
    /// Weight and bias of the norm of averaged tokens, `[width]` each.
    pub norm: Option<[Vec<f32>; 2]>,
    /// Running mean and variance, `[width]` each.
    pub statistics: Option<[Vec<f32>; 2]>,
}

impl Head {
    /// The head in a file, without its values; `None` where it has none. Beside a tower of `family` it is that tower's: it
    /// stands under a part of what stands before the tower's names. `key` says which of several towers is meant.
    ///
    /// # Errors
    /// A file that cannot be read; a head of another kind.
    pub fn find(path: &Path, key: Option<&str>, family: Option<Family>) -> Result<Option<Head>, WeightsError> {
        let shapes = unwrapped(read_shapes_with_head(path, key)?);
        let prefix = family.and_then(|family| Some(to_canonical(shapes.clone(), family).ok()?.prefix));
        let Some(names) = Names::of(&shapes, prefix.as_deref()) else { return Ok(None) };
        let &[classes, width] = shapes[&names.weight].shape.as_slice() else { return Ok(None) };
        let vectors = names.vectors();
        let refuse = |reason: String| Err(WeightsError::format(path, reason));
        for (name, length) in
            vectors.map(|name| (name, if Some(name) == names.bias.as_ref() { classes } else { width }))
        {
            let shape = &shapes[name].shape;
            if *shape != [length] {
                return refuse(format!("`{name}` of its classifier is {shape:?}, expected [{length}]"));
            }
        }
        let scaled = format!("{}{BATCH_NORM}weight", names.stem());
        if shapes.contains_key(&scaled) {
            return refuse(format!("its classifier has a BatchNorm with a scale (`{scaled}`), which is not supported"));
        }
        let file = weights_file(path)?;
        Ok(Some(Head {
            of_run: CheckpointHeader::read(&file).is_ok(),
            file,
            classes,
            width,
            has_norm: names.norm.is_some(),
            has_statistics: names.statistics.is_some(),
            key: key.map(str::to_owned),
            names,
        }))
    }

    /// Its values.
    ///
    /// # Errors
    /// A file that cannot be read, or has changed; values that are not finite.
    pub fn read(&self) -> Result<HeadTensors, WeightsError> {
        let mut tensors = unwrapped(read_with_head(&self.file, self.key.as_deref())?);
        let mut take = |name: &String, length: usize| match tensors.remove(name) {
            Some(tensor) if tensor.data.len() != length => {
                Err(WeightsError::format(&self.file, format!("`{name}` has another shape than before")))
            }
            Some(tensor) if tensor.data.iter().any(|value| !value.is_finite()) => {
                Err(WeightsError::format(&self.file, format!("`{name}` has values that are not finite")))
            }
            Some(tensor) => Ok(tensor.data),
            None => Err(WeightsError::format(&self.file, format!("`{name}` is gone"))),
        };
        let (classes, width) = (self.classes, self.width);
        let mut pair = |names: &Option<[String; 2]>| -> Result<Option<[Vec<f32>; 2]>, WeightsError> {
            let Some([first, second]) = names else { return Ok(None) };
            Ok(Some([take(first, width)?, take(second, width)?]))
        };
        let (norm, statistics) = (pair(&self.names.norm)?, pair(&self.names.statistics)?);
        let weight = take(&self.names.weight, classes * width)?;
        let bias = self.names.bias.as_ref().map_or(Ok(vec![0.0; classes]), |bias| take(bias, classes))?;
        Ok(HeadTensors { weight, bias, norm, statistics })
    }
}

impl Names {
    /// The innermost head; of a tower's, the one under a part of its prefix.
    fn of(shapes: &TensorMap, tower: Option<&str>) -> Option<Names> {
        let is_layer = |name: &str| shapes.get(name).is_some_and(|tensor| tensor.shape.len() == 2);
        let before = |name: &str, layer: &str| -> Option<String> {
            let before = name.strip_suffix("weight")?.strip_suffix(layer)?;
            let is_part = before.is_empty() || before.ends_with('.');
            (is_part && tower.is_none_or(|tower| tower.starts_with(before))).then(|| before.to_owned())
        };
        let found = shapes.keys().filter(|name| is_layer(name)).flat_map(|name| {
            LAYERS.into_iter().filter_map(move |layer| Some((before(name, layer)?, layer, name.clone())))
        });
        let (before, layer, weight) = match tower {
            Some(_) => found.max_by_key(|(before, ..)| before.len())?,
            None => found.min_by_key(|(before, ..)| before.len())?,
        };
        let pair = |stem: String, ends: [&str; 2]| {
            let names = ends.map(|end| format!("{stem}{end}"));
            names.iter().all(|name| shapes.contains_key(name)).then_some(names)
        };
        let places = [Some(before.as_str()), tower];
        let norm = places.into_iter().flatten().find_map(|place| pair(format!("{place}{FC_NORM}"), ["weight", "bias"]));
        let statistics = (layer == LAYERS[1])
            .then(|| pair(format!("{before}{BATCH_NORM}"), ["running_mean", "running_var"]))
            .flatten();
        let bias = Some(format!("{before}{layer}bias")).filter(|bias| shapes.contains_key(bias));
        Some(Names { weight, bias, norm, statistics })
    }

    /// All but the weight.
    fn vectors(&self) -> impl Iterator<Item = &String> {
        self.bias.iter().chain(self.norm.iter().flatten()).chain(self.statistics.iter().flatten())
    }

    /// What stands before all of them.
    fn stem(&self) -> &str {
        let stem = |layer: &&str| self.weight.strip_suffix("weight")?.strip_suffix(*layer);
        LAYERS.iter().filter_map(stem).min_by_key(|stem| stem.len()).unwrap_or_default()
    }
}

/// The file of a head: the path itself, what the stage of a folder left, what the one stage of a run left that trained a
/// classifier, or the weights file of a folder.
///
/// # Errors
/// A run of which no stage, or more than one, left a classifier; a folder without weights.
pub fn head_file(path: &Path) -> Result<PathBuf, WeightsError> {
    if path.join(LEFT).is_file() {
        return Ok(path.join(LEFT));
    }
    if !path.join("checkpoints").is_dir() {
        return weights_file(path);
    }
    let heads = heads_of_run(path);
    match heads.as_slice() {
        [(_, file)] => Ok(file.clone()),
        [] => Err(WeightsError::format(path, "it is a run directory in which no stage has left a classifier")),
        [(_, first), ..] => {
            let stages: Vec<&str> = heads.iter().map(|(stage, _)| stage.as_str()).collect();
            let reason = format!(
                "it is a run directory in which the stages `{}` left classifiers; name one of them: {}",
                stages.join("`, `"),
                first.parent().unwrap_or(first).display()
            );
            Err(WeightsError::format(path, reason))
        }
    }
}

/// The stages of a run that left a classifier, each with what it left, sorted by name. What cannot be read is not among them.
pub fn heads_of_run(run: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    let mut heads: Vec<(String, PathBuf)> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path().join(LEFT))))
        .filter(|(_, file)| file.is_file() && Head::find(file, None, None).is_ok_and(|head| head.is_some()))
        .collect();
    heads.sort();
    heads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::HostTensor;

    fn names(tensors: &[(&str, &[usize])], tower: Option<&str>) -> Option<Names> {
        let tensor = |(name, shape): &(&str, &[usize])| (name.to_string(), HostTensor::shape_only(shape.to_vec()));
        Names::of(&tensors.iter().map(tensor).collect(), tower)
    }

    /// What programs call it, and whose it is where a file has several.
    #[test]
    fn a_head_is_found_by_its_names() {
        let matrix: &[usize] = &[5, 8];
        let found = |tensors: &[(&str, &[usize])], tower| names(tensors, tower).map(|names| names.weight);
        for (weight, tower) in [
            ("head.weight", ""),
            ("classifier.weight", "vit."),
            ("module.head.weight", "module."),
            ("module.head.1.weight", "module.backbone."),
        ] {
            assert_eq!(found(&[(weight, matrix)], Some(tower)).as_deref(), Some(weight), "{weight}");
        }
        let both = [("model.head.weight", matrix), ("model_ema.head.weight", matrix)];
        for tower in ["model.", "model_ema."] {
            assert_eq!(found(&both, Some(tower)), Some(format!("{tower}head.weight")));
        }
        for none in ["overhead.weight", "head.mlp.0.weight", "decoder.head.weight", "head.bias"] {
            assert_eq!(found(&[(none, matrix)], Some("")), None, "{none}");
        }
        let vector: &[usize] = &[5];
        assert_eq!(found(&[("head.weight", vector)], Some("")), None);
    }

    #[test]
    fn what_stands_before_the_layer_is_found_too() {
        let (matrix, vector): (&[usize], &[usize]) = (&[5, 8], &[8]);
        let tuned = names(&[("head.weight", matrix), ("fc_norm.weight", vector), ("fc_norm.bias", vector)], Some(""));
        let tuned = tuned.unwrap();
        assert!(tuned.norm.is_some() && tuned.bias.is_none() && tuned.statistics.is_none());
        let probed = [("head.1.weight", matrix), ("head.0.running_mean", vector), ("head.0.running_var", vector)];
        let probed = names(&probed, None).unwrap();
        assert_eq!((probed.stem(), probed.vectors().count()), ("", 2));
    }
}
