//! What the end-to-end tests share: the command in a folder of its own, and files that tests compare and rewrite.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// Set to rewrite what snapshot tests compare with.
pub const UPDATE: &str = "MASKALIGN_UPDATE";

/// This package's folder, which holds the fixtures.
pub fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A temporary folder with the command in it under its own name.
pub struct Sandbox {
    folder: TempDir,
    command: PathBuf,
}

impl Sandbox {
    /// A folder with copies of the files of `tests/cli/recipes`. `binary` is `env!("CARGO_BIN_EXE_maskalign-under-test")`.
    ///
    /// # Panics
    /// The folder cannot be made.
    pub fn new(binary: &str) -> Sandbox {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let work = folder.path().join("work");
        fs::create_dir(&work).expect("a folder");
        for file in files_in(&here().join("cli/recipes")) {
            fs::copy(&file, work.join(file.file_name().expect("a file's name"))).expect("a copy");
        }
        // Help texts show the name that the command was called by.
        let command = folder
            .path()
            .join(format!("maskalign{}", std::env::consts::EXE_SUFFIX));
        if fs::hard_link(binary, &command).is_err() {
            fs::copy(binary, &command).expect("a copy");
        }
        Sandbox { folder, command }
    }

    /// The folder that commands run in.
    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// The command with arguments, in an environment that is the same on every machine.
    pub fn command<S: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
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
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        self.command(arguments)
            .output()
            .expect("the command starts")
    }

    /// Text without what differs from machine to machine and from version to version.
    pub fn redact(&self, text: &str) -> String {
        let folder = self.folder.path().display().to_string();
        text.replace(&folder, "[DIR]")
            .replace(env!("CARGO_PKG_VERSION"), "[VERSION]")
    }
}

/// The files of a folder, sorted.
///
/// # Panics
/// The folder cannot be read.
pub fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    files
}

/// Compares text with a committed file, or rewrites the file where [`UPDATE`] is set. Gives what is wrong.
///
/// # Panics
/// The file cannot be rewritten.
pub fn compare(file: &Path, text: &str) -> Option<String> {
    let committed = fs::read_to_string(file).unwrap_or_default();
    if committed == text {
        return None;
    }
    if std::env::var_os(UPDATE).is_some() {
        fs::write(file, text).expect("the file is written");
        return None;
    }
    let differs = committed
        .lines()
        .zip(text.lines())
        .position(|(a, b)| a != b);
    let line = differs.unwrap_or_else(|| committed.lines().count().min(text.lines().count()));
    Some(format!(
        "{} is stale from line {}; {UPDATE}=1 rewrites it\n  committed: {}\n  now:       {}",
        file.display(),
        line + 1,
        committed.lines().nth(line).unwrap_or("(the end)"),
        text.lines().nth(line).unwrap_or("(the end)"),
    ))
}
