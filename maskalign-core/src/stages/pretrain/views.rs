//! Which crops of an image the towers see, and which are compared with which.

use std::collections::BTreeSet;

use maskalign_registry::Refusal;

use crate::{
    component,
    components::{tokens::Tokens, towers::TowerShape},
    data::ViewCrop,
};

/// Which crops are compared.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Pairs {
    /// Each crop of the student with the same of the target.
    #[default]
    Same,
    /// Each crop of the student with all others of the target (DINO, arXiv 2104.14294, equation 3).
    Different,
    /// Each crop of the student with all of the target.
    All,
}

/// The views that an objective compares. The mean over all pairs of crops counts.
#[component]
pub(super) struct ComparedViews {
    /// Views that the student sees, by their names under `data.views`.
    #[schemars(length(min = 1))]
    student: Vec<String>,
    /// Views that the target is computed from. Absent: the student's.
    #[serde(default)]
    #[schemars(length(min = 1))]
    target: Option<Vec<String>>,
    /// Which of their crops are compared: `same`, `different` or `all`.
    #[serde(default)]
    pairs: Pairs,
}

/// A crop as the towers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenCrop {
    /// Its view; empty where an image has one view alone.
    pub view: String,
    /// Which of the view's.
    pub copy: usize,
    /// Side in pixels.
    pub size: usize,
    /// Side in pixels of what the student makes of it.
    pub runs_at: usize,
    /// Whether the masker draws for it.
    pub is_masked: bool,
}

impl SeenCrop {
    /// What a random stream is for: one of its own for each crop, where there are several.
    pub(super) fn purpose(&self, purpose: &str) -> String {
        match self.view.is_empty() {
            true => purpose.to_owned(),
            false => format!("{purpose}, {} {}", self.view, self.copy),
        }
    }

    /// Patches of what the student makes of it.
    pub(super) fn patches(&self, student: &TowerShape) -> usize {
        (self.runs_at / student.arch.patch).pow(2)
    }
}

/// Crops that go through a tower together: of one size, and masked or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Their places among all crops.
    pub crops: Vec<usize>,
}

/// The crops of a stage, as far as its options say; `data` has none where an image has one view alone.
pub(super) fn crops(
    data: &[ViewCrop],
    size: usize,
    student: &TowerShape,
    has_masker: bool,
    masked_views: Option<&[String]>,
    sees_sizes: bool,
) -> Result<Vec<SeenCrop>, Refusal> {
    if data.is_empty() {
        return match masked_views {
            Some(_) => {
                Err(Refusal::new("masked_views", "the data has no views").help("leave it out, or name `data.views`"))
            }
            None => Ok(vec![SeenCrop {
                view: String::new(),
                copy: 0,
                size,
                runs_at: student.image_size,
                is_masked: has_masker,
            }]),
        };
    }
    for (place, name) in masked_views.unwrap_or_default().iter().enumerate() {
        known(name, data).map_err(|refusal| at(refusal, "masked_views", place))?;
    }
    if masked_views.is_some() && !has_masker {
        return Err(
            Refusal::new("masked_views", "there is no masker").help("give the stage a `masker`, or leave this out")
        );
    }
    let mut all = Vec::new();
    for crop in data {
        let side = crop.size.0;
        let is_masked = has_masker && masked_views.is_none_or(|views| views.contains(&crop.view));
        if side != size {
            let of_view = |message: String| Refusal::whole(message).under(&crop.view).under("views").under("data");
            if side % student.arch.patch != 0 {
                let message = format!("{side} pixels are not a whole number of patches of {}", student.arch.patch);
                return Err(of_view(message).help("choose a multiple of the student's patch"));
            }
            if !sees_sizes {
                let message = format!("it has {side} pixels, the first view {size}");
                return Err(of_view(message).help("this student sees images of one size"));
            }
            if is_masked {
                let message =
                    format!("view `{}` has {side} pixels, and masks are drawn for those of {size}", crop.view);
                let place = masked_views.and_then(|views| views.iter().position(|view| *view == crop.view));
                let refusal = match place {
                    Some(place) => at(Refusal::whole(message), "masked_views", place),
                    None => Refusal::new("masked_views", message),
                };
                return Err(refusal.help("name the views of the first one's size here, and leave the others out"));
            }
        }
        let runs_at = if side == size { student.image_size } else { side };
        all.push(SeenCrop { view: crop.view.clone(), copy: crop.copy, size: side, runs_at, is_masked });
    }
    Ok(all)
}

/// What is compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Compared {
    /// A crop of the student and one of the target.
    pub pairs: Vec<(usize, usize)>,
    /// Whether a crop may be compared with another.
    pub crosses: bool,
}

impl Compared {
    /// Whether the student's or the target's crop is one.
    pub(super) fn student(&self) -> BTreeSet<usize> {
        self.pairs.iter().map(|pair| pair.0).collect()
    }

    /// The crops that the target is computed from.
    pub(super) fn target(&self) -> BTreeSet<usize> {
        self.pairs.iter().map(|pair| pair.1).collect()
    }

    /// With the crops at the places that they have once others are left out.
    pub(super) fn placed(&self, keep: &BTreeSet<usize>) -> Self {
        let place = |crop: usize| keep.range(..crop).count();
        let pairs = self.pairs.iter().map(|&(student, target)| (place(student), place(target))).collect();
        Compared { pairs, ..*self }
    }
}

impl ComparedViews {
    /// The crops that are compared on `tokens`; `None` compares each with itself.
    pub(super) fn plan(
        views: Option<&Self>,
        crops: &[SeenCrop],
        size: usize,
        tokens: Tokens,
    ) -> Result<Compared, Refusal> {
        let is_one = crops.len() == 1 && crops[0].view.is_empty();
        if is_one && views.is_some() {
            return Err(Refusal::new("views", "the data has no views").help("leave this out, or give `data` some"));
        }
        let places = |option: &'static str, names: Option<&Vec<String>>| -> Result<Vec<usize>, Refusal> {
            let Some(names) = names else { return Ok((0..crops.len()).collect()) };
            let mut places = Vec::new();
            for (place, name) in names.iter().enumerate() {
                let of_view: Vec<usize> = (0..crops.len()).filter(|&crop| crops[crop].view == *name).collect();
                if of_view.is_empty() || names[..place].contains(name) {
                    let refusal = match of_view.is_empty() {
                        true => unknown(name, crops.iter().map(|crop| crop.view.as_str())),
                        false => Refusal::whole(format!("`{name}` is named twice")),
                    };
                    return Err(at(refusal, option, place).under("views"));
                }
                places.extend(of_view);
            }
            Ok(places)
        };
        let student = places("student", views.map(|views| &views.student))?;
        let named = views.map(|views| views.target.as_ref().unwrap_or(&views.student));
        let target = places("target", named)?;
        let pairs = views.map(|views| views.pairs).unwrap_or_default();
        let mut compared = Compared { pairs: Vec::new(), crosses: pairs != Pairs::Same };
        for &of_target in &target {
            let fits = |of_student: &usize| match pairs {
                Pairs::Same => *of_student == of_target,
                Pairs::Different => *of_student != of_target,
                Pairs::All => true,
            };
            compared.pairs.extend(student.iter().copied().filter(fits).map(|of_student| (of_student, of_target)));
        }
        let refuse = |option: &'static str, message: String| Refusal::new(option, message).under("views");
        if compared.pairs.is_empty() {
            let text = "no crop of the student's views is compared with any of the target's".to_owned();
            return Err(refuse("pairs", text).help("`same` compares views that both name, `different` all others"));
        }
        if compared.crosses && (tokens.visible || tokens.masked) {
            let text = "patches of different crops lie at different places: only `same` compares them".to_owned();
            return Err(refuse("pairs", text).beside(["tokens"], "patches are asked for here"));
        }
        let unfit = |option: &'static str, crop: usize, why: &str| {
            let SeenCrop { view, .. } = &crops[crop];
            let refusal = match views {
                Some(_) => refuse(option, format!("view `{view}` {why}")),
                None => Refusal::whole(format!("view `{view}` {why}")),
            };
            refusal.help("name the views that are compared: `views: {student: [...]}`")
        };
        if let Some(&crop) = compared.student().iter().find(|&&crop| tokens.masked && !crops[crop].is_masked) {
            return Err(unfit("student", crop, "is not masked, and `masked` tokens are compared")
                .beside(["tokens"], "`masked` is asked for here"));
        }
        let of_target = if views.is_some_and(|views| views.target.is_some()) { "target" } else { "student" };
        if let Some(&crop) = compared.target().iter().find(|&&crop| crops[crop].size != size) {
            return Err(unfit(
                of_target,
                crop,
                "has another size than the first view, and targets are computed from views of its size",
            ));
        }
        Ok(compared)
    }
}

/// Groups crops that may go through a tower together.
pub(super) fn grouped(places: impl IntoIterator<Item = usize>, crops: &[SeenCrop]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for place in places {
        let key = |place: usize| (crops[place].size, crops[place].is_masked);
        match groups.iter_mut().find(|group| key(group.crops[0]) == key(place)) {
            Some(group) => group.crops.push(place),
            None => groups.push(Group { crops: vec![place] }),
        }
    }
    groups
}

fn at(refusal: Refusal, option: &'static str, place: usize) -> Refusal {
    refusal.under(place.to_string()).under(option)
}

fn known(name: &str, data: &[ViewCrop]) -> Result<(), Refusal> {
    match data.iter().any(|crop| crop.view == name) {
        true => Ok(()),
        false => Err(unknown(name, data.iter().map(|crop| crop.view.as_str()))),
    }
}

fn unknown<'a>(name: &str, views: impl Iterator<Item = &'a str>) -> Refusal {
    let mut known: Vec<&str> = views.collect();
    known.dedup();
    Refusal::whole(format!("no view is named `{name}`")).help(format!("views of the data: {}", known.join(", ")))
}
