//! Towers take from what stands beside their weights what the recipe leaves open, and refuse what contradicts it.

use maskalign_registry::{
    Refusal, Weights,
    plugin::sidecar::{Document, Sidecar, Statement, Verdict},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{
    nn::{Arch, Statistics},
    weights::{self, Description, Said, SaidActivation},
};

/// What stands beside a tower's weights, held against its options. What every tower has is taken up by
/// [`Beside::tower`]; the options that only some have are added by the other methods.
///
/// ```
/// use maskalign_core::prelude::*;
///
/// /// Of a tower with the options `arch`, `weights`, `image_size`, `eps` and `statistics`:
/// /// `register!(..., sidecar: beside)`.
/// fn beside(options: &Value) -> Result<Sidecar, Refusal> {
///     Ok(Beside::tower(options)?.image_size().gelu().class_token().finish())
/// }
///
/// // Nothing stands beside a file that is not there.
/// assert_eq!(beside(&json!({ "weights": "nowhere.safetensors" }))?, Sidecar::default());
/// # Ok::<(), Refusal>(())
/// ```
pub struct Beside<'o> {
    options: &'o Value,
    description: Description,
    sidecar: Sidecar,
}

impl<'o> Beside<'o> {
    /// Reads what stands beside the file that the option `weights` names, and holds `arch`, `eps`, `statistics`, and what
    /// no tower here has (registers, gated MLPs) against it.
    ///
    /// # Errors
    /// A document there that cannot be read; names `weights`.
    pub fn tower(options: &'o Value) -> Result<Beside<'o>, Refusal> {
        let weights =
            options.get("weights").and_then(|weights| serde_json::from_value::<Weights>(weights.clone()).ok());
        let file = weights.as_ref().and_then(|weights| Some(weights.file()?.0.to_string()));
        let path = file.and_then(|file| weights::locate(&file).ok()).filter(|path| path.exists());
        let description = match path {
            Some(path) => weights::describe(&path).map_err(|error| {
                Refusal::new("weights", error.to_string())
                    .help("mend or remove the file; what a recipe leaves open is taken from it")
            })?,
            None => Description::default(),
        };
        let mut beside = Beside { options, description, sidecar: Sidecar::default() };
        beside.arch();
        let eps = beside.description.eps.take();
        beside.option("eps", eps, |eps| json!(eps));
        beside.statistics();
        let registers = beside.description.registers.take().filter(|said| said.value > 0);
        beside
            .refuse(registers, |count| format!("these weights have {count} register tokens, and this tower has none"));
        let gated = beside.description.gated.take().filter(|said| said.value);
        beside.refuse(gated, |_| "these weights have gated MLPs (SwiGLU), and this tower has plain ones".to_owned());
        Ok(beside)
    }

    /// With the option `image_size`. A tower that keeps the size of the data, as a student does, does without.
    #[must_use]
    pub fn image_size(mut self) -> Self {
        // Another size is no contradiction: positions are resized.
        if self.options.get("image_size").is_none()
            && let Some(said) = self.description.image_size.take()
        {
            self.fill(vec!["image_size".to_owned()], said, |size| json!(size));
        }
        self
    }

    /// With the option `activation`: `quick_gelu` or `gelu`.
    #[must_use]
    pub fn activation(mut self) -> Self {
        let Some(said) = self.description.activation.take() else { return self };
        match &said.value {
            SaidActivation::Other(name) => self.refuse_activation(said.map(|_| name.clone())),
            SaidActivation::QuickGelu => {
                self.option("activation", Some(said.map(|_| "quick_gelu".to_owned())), |name| json!(name));
            }
            SaidActivation::Gelu => {
                self.option("activation", Some(said.map(|_| "gelu".to_owned())), |name| json!(name));
            }
        }
        self
    }

    /// Without that option: the tower computes the exact GELU.
    #[must_use]
    pub fn gelu(mut self) -> Self {
        let Some(said) = self.description.activation.take() else { return self };
        match &said.value {
            SaidActivation::Gelu => {}
            SaidActivation::QuickGelu => self.refuse_activation(said.map(|_| "quick_gelu".to_owned())),
            SaidActivation::Other(name) => self.refuse_activation(said.map(|_| name.clone())),
        }
        self
    }

    /// With the option `projection`.
    #[must_use]
    pub fn projection(mut self) -> Self {
        let projection = self.description.projection.take();
        self.option("projection", projection, |size| json!(size));
        self
    }

    /// With the option `cls_token`.
    #[must_use]
    pub fn cls_token(mut self) -> Self {
        let cls_token = self.description.cls_token.take();
        self.option("cls_token", cls_token, |is_there| json!(is_there));
        self
    }

    /// With the option `layer_scale`.
    #[must_use]
    pub fn layer_scale(mut self) -> Self {
        let layer_scale = self.description.layer_scale.take();
        // Only that there are scales matters: their values are those of the weights.
        if self.options.get("layer_scale").is_none() {
            self.option("layer_scale", layer_scale, |value| json!(value));
        }
        self
    }

    /// Without that option: the tower has a class token.
    #[must_use]
    pub fn class_token(mut self) -> Self {
        let none = self.description.cls_token.take().filter(|said| !said.value);
        self.refuse(none, |_| "these weights are of a tower without a class token, and this tower has one".to_owned());
        self
    }

    /// Without that option: the tower has no class token.
    #[must_use]
    pub fn no_class_token(mut self) -> Self {
        let some = self.description.cls_token.take().filter(|said| said.value);
        self.refuse(some, |_| "these weights are of a tower with a class token, and this tower has none".to_owned());
        self
    }

    /// What was found.
    pub fn finish(self) -> Sidecar {
        let documents = match self.sidecar.statements.is_empty() {
            true => Vec::new(),
            false => {
                let document =
                    |(path, text): (std::path::PathBuf, String)| Document { name: path.display().to_string(), text };
                self.description.documents.into_iter().map(document).collect()
            }
        };
        Sidecar { documents, ..self.sidecar }
    }

    fn arch(&mut self) {
        let Description { dim, depth, heads, mlp, patch, .. } = &mut self.description;
        let said = [
            ("dim", "channels", dim.take()),
            ("depth", "blocks", depth.take()),
            ("heads", "attention heads", heads.take()),
            ("mlp", "channels inside the MLP", mlp.take()),
            ("patch", "pixels a side of a patch", patch.take()),
        ];
        let Some(written) = self.options.get("arch") else {
            let is_known = said.iter().all(|(key, _, said)| *key == "mlp" || said.is_some());
            for (key, _, said) in said.into_iter().filter(|_| is_known) {
                if let Some(said) = said {
                    self.fill(vec!["arch".to_owned(), key.to_owned()], said, |size| json!(size));
                }
            }
            return;
        };
        let Ok(Some(arch)) = serde_json::from_value::<Option<Arch>>(written.clone()) else { return };
        let sizes = said.into_iter().zip([arch.dim, arch.depth, arch.heads, arch.mlp, arch.patch]);
        let differ: Vec<(&str, Said<usize>, usize)> = sizes
            .filter_map(|((_, what, said), ours)| Some((what, said.filter(|said| said.value != ours)?, ours)))
            .collect();
        // One mistake, at the first size that differs.
        if let [(_, first, _), ..] = &differ[..] {
            let ours: Vec<String> = differ.iter().map(|(what, _, ours)| format!("{ours} {what}")).collect();
            let theirs: Vec<String> = differ.iter().map(|(_, said, _)| said.value.to_string()).collect();
            let message = format!("`arch` has {}, and the tower in `weights` {}", ours.join(", "), theirs.join(", "));
            let first = first.clone();
            self.contradict("arch", &first, message);
        }
    }

    fn statistics(&mut self) {
        let (Some(mean), Some(std)) = (self.description.mean.take(), self.description.std.take()) else { return };
        let of = |values: [f64; 3]| values.map(|value| value as f32);
        let statistics = Statistics { mean: of(mean.value), std: of(std.value) };
        let said = Said { value: statistics, document: mean.document, at: mean.at };
        self.option("statistics", Some(said), |statistics| json!(statistics));
    }

    /// Takes up what is said of an option, or refuses what is written for it.
    fn option<T: DeserializeOwned + PartialEq>(
        &mut self,
        option: &str,
        said: Option<Said<T>>,
        value: impl Fn(&T) -> Value,
    ) {
        let Some(said) = said else { return };
        let Some(written) = self.options.get(option) else {
            return self.fill(vec![option.to_owned()], said, value);
        };
        // What cannot be read is refused by the check; `null` says that nothing is to be taken.
        match serde_json::from_value::<Option<T>>(written.clone()) {
            Ok(Some(ours)) if ours != said.value => {
                let message = format!(
                    "`{option}` is {}, and these weights were trained with {}",
                    shown(written),
                    shown(&value(&said.value))
                );
                self.contradict(option, &said, message);
            }
            _ => {}
        }
    }

    fn fill<T>(&mut self, option: Vec<String>, said: Said<T>, value: impl Fn(&T) -> Value) {
        let verdict = Verdict::Fills(value(&said.value));
        self.sidecar.statements.push(Statement { option, document: said.document, at: said.at, verdict });
    }

    fn contradict<T>(&mut self, option: &str, said: &Said<T>, message: String) {
        let help = format!("leave `{option}` out to take it from there, or correct the file if it is wrong");
        self.state(option, said, message, "what the weights were saved with", help);
    }

    /// Refuses weights for what this tower never is.
    fn refuse<T>(&mut self, said: Option<Said<T>>, message: impl Fn(&T) -> String) {
        if let Some(said) = said {
            let help = "name other weights, or a tower that has it (`maskalign list`)".to_owned();
            self.state("weights", &said, message(&said.value), "what the weights were saved with", help);
        }
    }

    fn refuse_activation(&mut self, said: Said<String>) {
        self.refuse(Some(said), |name| format!("these weights need the activation `{name}`, which this tower has not"));
    }

    fn state<T>(&mut self, option: &str, said: &Said<T>, message: String, note: &str, help: String) {
        self.sidecar.statements.push(Statement {
            option: vec![option.to_owned()],
            document: said.document,
            at: said.at.clone(),
            verdict: Verdict::Contradicts { message, said: note.to_owned(), help },
        });
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        other => other.to_string(),
    }
}
