//! What the end-to-end tests share: the command in a folder of its own, and files that tests compare and rewrite.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
#[cfg(unix)]
use std::{
    process::{Child, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use snapbox::{
    Assert, Data,
    assert::{DEFAULT_ACTION_ENV, Error},
    data::DataFormat,
};
use tempfile::TempDir;

/// This package's folder, which holds the fixtures.
pub(crate) fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A temporary folder with the command in it under its own name.
pub(crate) struct Sandbox {
    folder: TempDir,
    command: PathBuf,
}

impl Sandbox {
    /// A folder with copies of the files of `tests/cli/recipes`.
    ///
    /// # Panics
    /// The folder cannot be made.
    pub(crate) fn new() -> Sandbox {
        let binary = env!("CARGO_BIN_EXE_maskalign-under-test");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let work = folder.path().join("work");
        fs::create_dir(&work).expect("a folder");
        for file in files_in(&here().join("cli/recipes")) {
            fs::copy(&file, work.join(file.file_name().expect("a file's name"))).expect("a copy");
        }
        // Help texts show the name that the command was called by.
        let command = folder.path().join(format!("maskalign{}", std::env::consts::EXE_SUFFIX));
        if fs::hard_link(binary, &command).is_err() {
            fs::copy(binary, &command).expect("a copy");
        }
        Sandbox { folder, command }
    }

    /// The folder that commands run in.
    pub(crate) fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// The command with arguments, in an environment that is the same on every machine.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.command);
        command.args(arguments).current_dir(self.work()).env_clear();
        // What Windows needs to start a process at all.
        for name in ["SYSTEMROOT", "PATH"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("HOME", self.folder.path());
        command
    }

    /// Runs the command to its end.
    ///
    /// # Panics
    /// The command does not start.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        self.command(arguments).output().expect("the command starts")
    }

    /// Text without what differs from machine to machine and from version to version.
    pub(crate) fn redact(&self, text: &str) -> String {
        let folder = self.folder.path().display().to_string();
        text.replace(&folder, "[DIR]").replace(env!("CARGO_PKG_VERSION"), "[VERSION]")
    }
}

/// What must be equal between runs of one recipe.
#[derive(Debug)]
pub(crate) struct RunRecord {
    /// The bytes of each stage's `final.safetensors`, by stage.
    pub(crate) finals: BTreeMap<String, Vec<u8>>,
    /// The records of `metrics.jsonl` without timings, in order.
    pub(crate) steps: Vec<Value>,
    /// `summary.json` without timings.
    pub(crate) summary: Value,
}

/// Reads a run directory.
///
/// # Panics
/// A file is missing, or a line of the metrics is torn.
pub(crate) fn run_record(dir: &Path) -> RunRecord {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let parse = |text: &str| -> Value {
        let mut value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        drop_timings(&mut value);
        value
    };
    let summary = parse(&read(&dir.join("summary.json")));
    let metrics = read(&dir.join("metrics.jsonl"));
    assert!(metrics.is_empty() || metrics.ends_with('\n'), "a torn line at the end of the metrics");
    let finals = summary.as_object().expect("an object").keys().map(|stage| {
        let path = dir.join("checkpoints").join(stage).join("final.safetensors");
        (stage.clone(), fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    });
    RunRecord { finals: finals.collect(), steps: metrics.lines().map(parse).collect(), summary }
}

/// Takes what a clock gave out of a record.
fn drop_timings(value: &mut Value) {
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        if let Value::Object(entries) = value {
            entries.retain(|name, _| !name.contains("seconds") && !name.ends_with("_per_s"));
            open.extend(entries.values_mut());
        }
    }
}

impl RunRecord {
    /// Holds another run against this one.
    ///
    /// # Panics
    /// They differ.
    pub(crate) fn assert_same(&self, other: &RunRecord, what: &str) {
        assert_eq!(other.steps, self.steps, "{what}: the metrics differ");
        assert_eq!(other.summary, self.summary, "{what}: the summaries differ");
        let stages = |record: &RunRecord| record.finals.keys().cloned().collect::<Vec<_>>();
        assert_eq!(stages(other), stages(self), "{what}: other stages");
        for (stage, bytes) in &self.finals {
            assert!(other.finals[stage] == *bytes, "{what}: the final weights of `{stage}` differ");
        }
    }
}

/// The files of a folder, sorted.
///
/// # Panics
/// The folder cannot be read.
pub(crate) fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

/// Compares text with a committed file, byte by byte but for the ends of lines; `SNAPSHOTS=overwrite` rewrites the file.
pub(crate) fn compare(file: &Path, text: String) -> Result<(), Error> {
    let committed = Data::read_from(file, Some(DataFormat::Text)).raw();
    Assert::new().action_env(DEFAULT_ACTION_ENV).try_eq(Some(&"now"), Data::text(text), committed)
}

/// Asserts that text is that of a committed file; see [`compare`].
///
/// # Panics
/// It is not.
#[track_caller]
pub(crate) fn assert_committed(file: &Path, text: String) {
    if let Err(stale) = compare(file, text) {
        panic!("{stale}");
    }
}

/// Holds an end against what it should be.
///
/// # Panics
/// It is another, or the command panicked.
#[track_caller]
pub(crate) fn ends(output: &Output, code: i32, says: &[&str]) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{says:?}: {err}");
    assert!(!err.contains("panicked"), "{err}");
    for part in says {
        assert!(err.contains(part), "expected `{part}` in: {err}");
    }
}

/// The names of all files below a folder, as paths inside it, sorted.
///
/// # Panics
/// A folder cannot be read.
pub(crate) fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("a folder").flatten() {
            match entry.path().is_dir() {
                true => open.push(entry.path()),
                false => found.push(entry.path().strip_prefix(folder).expect("inside").display().to_string()),
            }
        }
    }
    found.sort();
    found
}

/// Starts the command, which writes a run to `run`, and waits until so many records are in its metrics.
///
/// # Panics
/// It does not start, or writes none for two minutes.
#[cfg(unix)]
pub(crate) fn after_records(mut command: Command, run: &Path, records: usize) -> Child {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let limit = Instant::now() + Duration::from_secs(120);
    while fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count()) < records {
        assert!(Instant::now() < limit, "no step was made");
        sleep(Duration::from_millis(5));
    }
    child
}
