//! `maskalign new plugin`: a crate with a component of its own, ready to train with.

use std::{
    fs,
    path::{Path, PathBuf},
};

use maskalign_registry::{Kind, Registry};

use crate::{failure::Failure, output, session::Session};

const EXAMPLES: &str = "\
Examples:
  maskalign new plugin lattice
  maskalign new plugin lattice --path ../maskalign     build against a checkout of MaskAlign";

/// Start a crate with a component of your own
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Plugin(Plugin),
}

/// Write a crate with a masker, a test, a recipe that trains with it, and a binary with every verb
///
/// The crate depends on maskalign-core and maskalign-cli, and for its tests on maskalign-testkit. Its binary has every verb
/// of this command and knows the new component in `list`, `explain`, `schema` and error messages.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
struct Plugin {
    /// The crate's name: lower-case letters, digits, `-` and `_`; the folder and the component are named after it
    name: String,
    /// A checkout of MaskAlign to build against [default: the one that this binary was built in, where it is still
    /// there, and the published crates of this version otherwise]
    #[arg(long, value_name = "CHECKOUT")]
    path: Option<PathBuf>,
}

/// The files, by path in the crate. `{{...}}` is replaced.
const TEMPLATE: [(&str, &str); 7] = [
    ("Cargo.toml", include_str!("template/Cargo.toml.txt")),
    ("README.md", include_str!("template/README.md.txt")),
    (".gitignore", "/target\n/runs\n"),
    ("recipe.yaml", include_str!("template/recipe.yaml.txt")),
    ("src/lib.rs", include_str!("template/lib.rs.txt")),
    ("src/main.rs", include_str!("template/main.rs.txt")),
    ("tests/plugin.rs", include_str!("template/test.rs.txt")),
];

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let What::Plugin(plugin) = self.what;
        plugin.write(Path::new(""), session.registry)
    }
}

impl Plugin {
    fn write(&self, parent: &Path, registry: &Registry) -> Result<(), Failure> {
        let name = Name::parse(&self.name)?;
        // Two components of one name would be refused when the new binary starts.
        if let Some(taken) = registry.get(Kind::Masker, &name.component()) {
            let message = format!("there is a masker `{}` already, of the crate `{}`", taken.name, taken.package);
            return Err(Failure::mistake(message).help("choose another name: the component is named after the crate"));
        }
        let folder = parent.join(&self.name);
        let [cli, core, testkit] = self.dependencies()?;
        if folder.symlink_metadata().is_ok() {
            return Err(Failure::mistake(format!("{} is there already", folder.display()))
                .help("choose another name, or remove it"));
        }
        for (path, text) in TEMPLATE {
            let text = text
                .replace("{{dependencies}}", &format!("{cli}\n{core}"))
                .replace("{{test dependencies}}", &testkit)
                .replace("{{crate}}", &self.name)
                .replace("{{library}}", &self.name.replace('-', "_"))
                .replace("{{component}}", &name.component())
                .replace("{{Type}}", &name.type_name());
            let path = folder.join(path);
            let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
            written.map_err(|error| Failure::failed(format!("cannot write {}: {error}", path.display())))?;
        }
        let shown = folder.display();
        Ok(output::print(&format!(
            "wrote {shown}\n\nnext:\n  cd {shown}\n  cargo test\n  cargo run --release -- run recipe.yaml --steps 20\n"
        ))?)
    }

    /// The dependencies of the crate and of its tests, as lines of TOML.
    fn dependencies(&self) -> Result<[String; 3], Failure> {
        // Beside an installed crate of this binary there is none: cargo keeps each under its version.
        let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
        let built_in = built_in.filter(|root| root.join("maskalign-core/Cargo.toml").is_file());
        const NAMES: [&str; 3] = ["maskalign-cli", "maskalign-core", "maskalign-testkit"];
        let Some(checkout) = self.path.as_deref().or(built_in) else {
            return Ok(NAMES.map(|name| format!("{name} = \"{}\"", env!("CARGO_PKG_VERSION"))));
        };
        let not_a_checkout = || {
            Failure::mistake(format!("{} is not a checkout of MaskAlign", checkout.display()))
                .help("give the folder that holds `maskalign-core` and `maskalign-cli`")
        };
        // Absolute, so that the crate may be moved.
        let root = checkout.canonicalize().map_err(|_| not_a_checkout())?;
        let mut lines = [const { String::new() }; 3];
        for (line, name) in lines.iter_mut().zip(NAMES) {
            let path = root.join(name);
            let path = path.to_str().filter(|_| path.join("Cargo.toml").is_file()).ok_or_else(not_a_checkout)?;
            // A path as a TOML string: JSON escapes backslashes and quotes in the same way.
            *line = format!("{name} = {{ path = {} }}", serde_json::Value::from(path));
        }
        Ok(lines)
    }
}

/// A name in its words.
struct Name(Vec<String>);

impl Name {
    fn parse(name: &str) -> Result<Name, Failure> {
        let refuse = |why: &str| Failure::mistake(format!("`{name}` cannot name a crate: {why}"));
        if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Err(refuse("it must begin with a lower-case letter"));
        }
        if !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_') {
            return Err(refuse("use lower-case letters, digits, `-` and `_`"));
        }
        if name.len() > 64 {
            return Err(refuse("it has more than 64 characters"));
        }
        if RESERVED.contains(&name) || name.starts_with("maskalign") {
            return Err(refuse("the name is taken by Rust or by MaskAlign"));
        }
        let words: Vec<String> = name.split(['-', '_']).map(str::to_owned).collect();
        if words.iter().any(String::is_empty) {
            return Err(refuse("`-` and `_` stand between words, one at a time"));
        }
        Ok(Name(words))
    }

    fn component(&self) -> String {
        self.0.join("_")
    }

    fn type_name(&self) -> String {
        let capital = |word: &String| {
            let (first, rest) = word.split_at(1);
            first.to_ascii_uppercase() + rest
        };
        self.0.iter().map(capital).collect()
    }
}

/// Keywords, crates that every program has, names that the template uses, and folders that cargo makes.
const RESERVED: [&str; 57] = [
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "build",
    "const",
    "continue",
    "core",
    "crate",
    "deps",
    "do",
    "dyn",
    "else",
    "enum",
    "examples",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "grid",
    "if",
    "impl",
    "in",
    "incremental",
    "let",
    "loop",
    "macro",
    "mask",
    "masker",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "proc_macro",
    "pub",
    "ref",
    "return",
    "static",
    "std",
    "stream",
    "struct",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "unsafe",
    "use",
    "where",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_crates_are_refused() {
        for name in
            ["", "Lattice", "1st", "a b", "a/b", "..", "fn", "test", "maskalign-core", "-a", "a-", "a__b", "\u{e4}"]
        {
            assert!(Name::parse(name).is_err(), "{name}");
        }
        let name = Name::parse("my-second_mask2").unwrap();
        assert_eq!((name.component(), name.type_name()), ("my_second_mask2".into(), "MySecondMask2".into()));
    }

    #[test]
    fn nothing_of_the_template_is_left_to_replace() {
        let folder = tempfile::tempdir().unwrap();
        let plugin = Plugin { name: "my-mask".into(), path: None };
        // Printing to a closed stdout is not this test's matter.
        let registry = Registry::global().unwrap();
        let _ = plugin.write(folder.path(), registry);
        for (path, _) in TEMPLATE {
            let text = fs::read_to_string(folder.path().join("my-mask").join(path)).unwrap();
            assert!(!text.contains("{{"), "{path}");
        }
        assert!(plugin.write(folder.path(), registry).is_err(), "a folder that is there is left alone");
        let taken = Plugin { name: "random".into(), path: None };
        assert!(taken.write(folder.path(), registry).is_err(), "there is a masker of that name");
        assert!(!folder.path().join("random").exists());
    }
}
