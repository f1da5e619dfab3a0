//! `hf://` addresses, resolved in the cache that Hugging Face's own tools fill. Nothing here uses the network.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::WeightsError;

/// The files that hold a repository's weights, the preferred one first.
pub(super) const WEIGHT_FILES: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
];

/// Turns what a recipe names into the path of a file: `hf://ORG/REPO[@REVISION][/FILE]` through the local hub cache,
/// anything else as the path it is.
pub fn locate(spec: &str) -> Result<PathBuf, WeightsError> {
    if spec.starts_with("hf://") { HubCache::from_environment().find(spec) } else { Ok(PathBuf::from(spec)) }
}

/// The folder in which Hugging Face's tools keep what they downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubCache {
    root: Option<PathBuf>,
}

impl HubCache {
    /// A cache in this folder.
    pub fn at(root: impl Into<PathBuf>) -> HubCache {
        HubCache { root: Some(root.into()) }
    }

    /// The folder those tools would use: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME/hub`,
    /// `XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`, whichever is set first.
    pub fn from_environment() -> HubCache {
        HubCache::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> HubCache {
        let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(folder("HF_HOME")?.join("hub")))
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface/hub")))
            .or_else(|| Some(folder("HOME").or_else(|| folder("USERPROFILE"))?.join(".cache/huggingface/hub")));
        HubCache { root }
    }

    /// The path of the file that `spec` (`hf://ORG/REPO[@REVISION][/FILE]`) names.
    ///
    /// Without a file it is the first that is there of `model.safetensors`, its index, `pytorch_model.bin`, and open_clip's
    /// names for them. If the file is not in the cache, the error says which one to get, how, and where it was looked for.
    pub fn find(&self, spec: &str) -> Result<PathBuf, WeightsError> {
        let address = Address::parse(spec)?;
        let not_in_cache = |problem: String| WeightsError::NotInCache { message: address.advice(self, &problem) };
        let Some(root) = &self.root else {
            return Err(not_in_cache("no cache folder is known, since neither HF_HOME nor HOME is set".into()));
        };
        let folder = root.join(format!("models--{}--{}", address.organisation, address.repository));
        if !folder.is_dir() {
            return Err(not_in_cache(format!("{} does not exist", folder.display())));
        }
        let snapshot = address.snapshot(&folder).map_err(not_in_cache)?;
        let wanted = match address.file {
            Some(file) => vec![file],
            None => WEIGHT_FILES.to_vec(),
        };
        let found = wanted.iter().map(|file| snapshot.join(file)).find(|path| path.is_file());
        found.ok_or_else(|| {
            let names = wanted.join(", ");
            let there = names_in(&snapshot);
            not_in_cache(format!("{} holds none of {names}; it holds {there}", snapshot.display()))
        })
    }
}

/// `hf://ORG/REPO[@REVISION][/FILE]` in parts.
struct Address<'a> {
    spec: &'a str,
    organisation: &'a str,
    repository: &'a str,
    revision: Option<&'a str>,
    file: Option<&'a str>,
}

impl<'a> Address<'a> {
    fn parse(spec: &'a str) -> Result<Address<'a>, WeightsError> {
        let refuse = |reason: &str| WeightsError::Address { spec: spec.to_owned(), reason: reason.to_owned() };
        let rest = spec.strip_prefix("hf://").ok_or_else(|| refuse("it does not begin with `hf://`"))?;
        let (organisation, rest) = rest.split_once('/').ok_or_else(|| refuse("it names no repository"))?;
        let (repository, file) = match rest.split_once('/') {
            Some((repository, file)) => (repository, Some(file)),
            None => (rest, None),
        };
        let (repository, revision) = match repository.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (repository, None),
        };
        for (part, what) in
            [(Some(organisation), "organisation"), (Some(repository), "repository"), (revision, "revision")]
        {
            if part.is_some_and(|part| !is_plain_name(part)) {
                return Err(refuse(&format!("its {what} is not a plain name")));
            }
        }
        if file.is_some_and(|file| !file.split('/').all(is_plain_name)) {
            return Err(refuse("its file is not a plain path"));
        }
        Ok(Address { spec, organisation, repository, revision, file })
    }

    /// The folder of the revision's files, or what is missing.
    fn snapshot(&self, folder: &Path) -> Result<PathBuf, String> {
        let revision = self.revision.unwrap_or("main");
        let snapshots = folder.join("snapshots");
        let reference = folder.join("refs").join(revision);
        let commit = match fs::read_to_string(&reference) {
            Ok(commit) => commit.trim().to_owned(),
            // A revision may also be a commit.
            Err(_) => revision.to_owned(),
        };
        let snapshot = snapshots.join(&commit);
        if is_plain_name(&commit) && snapshot.is_dir() {
            return Ok(snapshot);
        }
        let there = names_in(&snapshots);
        Err(format!("{} holds no revision `{revision}`; it holds the snapshots {there}", folder.display()))
    }

    /// One message: what is missing, the command that gets it, where it was looked for.
    fn advice(&self, cache: &HubCache, problem: &str) -> String {
        let Address { spec, organisation, repository, .. } = self;
        let file = self.file.unwrap_or(WEIGHT_FILES[0]);
        let revision = self.revision.map(|revision| format!(" --revision {revision}")).unwrap_or_default();
        let place = match &cache.root {
            Some(root) => format!("the cache is looked for in {}", root.display()),
            None => "the cache is looked for in HF_HUB_CACHE or HF_HOME/hub".to_owned(),
        };
        let alternative = match self.file {
            Some(_) => "",
            None => " (or `pytorch_model.bin` where the repository has no safetensors)",
        };
        format!(
            "`{spec}` is not in the local hub cache: {problem}\n  \
             get `{file}`{alternative} of {organisation}/{repository} with `hf download {organisation}/{repository} {file}{revision}`\n  \
             {place}; set HF_HUB_CACHE or HF_HOME to move it, or give a path to the file instead of `{spec}`"
        )
    }
}

/// A name that stays one path component on every system.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.+".contains(c))
}

/// The names in a folder, sorted, for a message.
fn names_in(folder: &Path) -> String {
    let mut names: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names.truncate(10);
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "57c216476eefef5ab752ec549e440a49ae4ae5f3";

    fn cache_with(files: &[&str]) -> (tempfile::TempDir, HubCache) {
        let folder = tempfile::tempdir().unwrap();
        let repository = folder.path().join("models--openai--clip-vit-base-patch16");
        let snapshot = repository.join("snapshots").join(COMMIT);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), COMMIT).unwrap();
        for file in files {
            fs::write(snapshot.join(file), "").unwrap();
        }
        let cache = HubCache::at(folder.path());
        (folder, cache)
    }

    #[test]
    fn safetensors_are_preferred_and_revisions_and_files_are_followed() {
        let (_folder, cache) = cache_with(&["pytorch_model.bin", "model.safetensors", "config.json"]);
        let found = |spec: &str| {
            let path = cache.find(&format!("hf://openai/clip-vit-base-patch16{spec}")).unwrap();
            assert!(path.parent().unwrap().ends_with(COMMIT));
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(found(""), "model.safetensors");
        assert_eq!(found("@main"), "model.safetensors");
        assert_eq!(found(&format!("@{COMMIT}")), "model.safetensors");
        assert_eq!(found("/pytorch_model.bin"), "pytorch_model.bin");
        let (_folder, cache) = cache_with(&["pytorch_model.bin"]);
        assert!(cache.find("hf://openai/clip-vit-base-patch16").unwrap().ends_with("pytorch_model.bin"));
    }

    #[test]
    fn what_is_absent_comes_with_the_command_that_gets_it() {
        let (folder, cache) = cache_with(&["config.json"]);
        let error = cache.find("hf://openai/clip-vit-base-patch16").unwrap_err();
        assert!(error.is_user_mistake());
        let error = error.to_string();
        assert!(error.contains("`hf download openai/clip-vit-base-patch16 model.safetensors`"), "{error}");
        assert!(error.contains("it holds config.json"), "{error}");
        assert!(error.contains(folder.path().to_str().unwrap()), "{error}");
        let error = cache.find("hf://facebook/dino-vitb16@v2/pytorch_model.bin").unwrap_err().to_string();
        assert!(error.contains("`hf download facebook/dino-vitb16 pytorch_model.bin --revision v2`"), "{error}");
        let error = cache.find("hf://openai/clip-vit-base-patch16@v9").unwrap_err().to_string();
        assert!(error.contains("no revision `v9`") && error.contains(COMMIT), "{error}");
    }

    #[test]
    fn addresses_cannot_leave_the_cache() {
        let (_folder, cache) = cache_with(&["model.safetensors"]);
        for spec in [
            "hf://openai",
            "hf:///repo",
            "hf://a/..",
            "hf://../b",
            "hf://a/b@../c",
            "hf://a/b@",
            "hf://a/b/../../x",
            "hf://a/b//x",
            "hf://a/b/",
            "hf://a/b\\c",
            "model.safetensors",
        ] {
            assert!(matches!(cache.find(spec), Err(WeightsError::Address { .. })), "{spec}");
        }
    }

    #[test]
    fn the_cache_is_where_the_hub_tools_put_it() {
        let with = |set: &'static [(&str, &str)]| {
            HubCache::from_variables(move |name| set.iter().find(|(key, _)| *key == name).map(|(_, v)| v.into()))
        };
        assert_eq!(with(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("HOME", "/u")]), HubCache::at("/c"));
        assert_eq!(with(&[("HF_HOME", "/h"), ("HOME", "/u")]), HubCache::at("/h/hub"));
        assert_eq!(
            with(&[("HF_HOME", ""), ("XDG_CACHE_HOME", "/x"), ("HOME", "/u")]),
            HubCache::at("/x/huggingface/hub")
        );
        assert_eq!(with(&[("HOME", "/u")]), HubCache::at("/u/.cache/huggingface/hub"));
        let error = with(&[]).find("hf://a/b").unwrap_err().to_string();
        assert!(error.contains("HF_HOME"), "{error}");
    }

    #[test]
    fn a_path_is_left_as_it_is() {
        assert_eq!(locate("weights/clip.safetensors").unwrap(), Path::new("weights/clip.safetensors"));
    }
}
