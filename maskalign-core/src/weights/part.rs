//! One of several towers in a file.

use std::collections::{BTreeMap, BTreeSet};

/// What is called `KEY.` and more; where nothing is, what there is.
pub(super) fn under<T>(key: &str, all: BTreeMap<String, T>) -> Result<BTreeMap<String, T>, String> {
    let start = format!("{}.", key.trim_end_matches('.'));
    let (found, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
        all.into_iter().partition(|(name, _)| name.starts_with(&start) || name.contains(&format!(".{start}")));
    if !found.is_empty() {
        return Ok(found);
    }
    let firsts: BTreeSet<&str> = others.keys().filter_map(|name| name.split('.').next()).collect();
    let firsts: Vec<String> = firsts.into_iter().take(10).map(|first| format!("`{first}`")).collect();
    Err(format!("no tensor in it is under `{key}`; names there begin with {}", firsts.join(", ")))
}
