//! What is called by internal names in a run directory, in words.

/// The title of a picture, by its name.
pub(super) fn picture_title(name: &str) -> String {
    let of = |prefix: &str, title: &str| name.strip_prefix(prefix).map(|rest| format!("{title} {rest}"));
    match name {
        "masks" => "What the student sees in training".to_owned(),
        "attention" => "What masks are drawn by".to_owned(),
        "attention-student" => "Where the student looks".to_owned(),
        "features" => "Features of patches".to_owned(),
        "neighbours" => "Images that are alike".to_owned(),
        "map" => "Features of images in a plane".to_owned(),
        "confusion" => "What was taken for what".to_owned(),
        name => of("attention-of-", "Where the teacher looks:")
            .or_else(|| of("reconstructions-", "What the student makes of hidden patches:"))
            .unwrap_or_else(|| name.replace('-', " ")),
    }
}

/// What a tower that a stage compares is called.
pub(super) fn tower_of(name: &str) -> String {
    match name {
        "untrained" => "student before training".to_owned(),
        "pixels" => "pixels themselves".to_owned(),
        name => name.to_owned(),
    }
}

/// What a number among results means, where its name does not tell. `scaled_by_patch` says that the loss is the squared error of
/// pixels whose mean is 0 and whose spread is 1 in each patch.
pub(super) fn explained(name: &str, scaled_by_patch: bool) -> Option<&'static str> {
    Some(match name {
        "loss" if scaled_by_patch => {
            "what training makes smaller: the mean of the last epoch. Predicting each hidden patch's mean gives 1: what is below \
             was learnt"
        }
        "steps" => "updates of the weights",
        "epochs" => "passes over the images",
        "loss" => "what training makes smaller: the mean of the last epoch",
        "pair_accuracy" => {
            "each image is cut twice at random; the share of images whose second cut is found by the first, among those of all \
             images. Higher is better"
        }
        "alignment" => {
            "how far apart the features of the two cuts are. Lower is nearer; only with a low uniformity it is better"
        }
        "uniformity" => {
            "how alike the features of different images are: 0 where they are all the same, lower is better"
        }
        "rankme" => {
            "in how many directions features differ (effective rank). Higher is better, among students of one width"
        }
        "alpha_req" => "how fast the directions lose weight. Near 1 is good; far above, few directions hold all",
        "cls_patch_similarity" => {
            "cosine between the class token and the patches of its image. Near 1 it says what they say"
        }
        "map" => "mean average precision: whether images of a class come first among all. Higher is better",
        "calibration_error" => "how far the stated certainty is from the share that is right. Lower is better",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_titles_and_unknown_ones_their_names() {
        assert_eq!(picture_title("attention-of-clip"), "Where the teacher looks: clip");
        assert_eq!(picture_title("reconstructions-pixels"), "What the student makes of hidden patches: pixels");
        assert_eq!(picture_title("a-plugins-own"), "a plugins own");
    }
}
