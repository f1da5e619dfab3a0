//! Logs to stderr, and the trace file.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, Targets},
    fmt::MakeWriter,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{failure::Failure, output, progress::Screen};

/// How much is told on stderr.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Verbosity {
    /// No progress, and no logs but warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Logging")]
    pub quiet: bool,
    /// More logs: -v for details, -vv for everything; `RUST_LOG` chooses by module
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Logging")]
    pub verbose: u8,
}

/// The trace that was requested, if any. It must live as long as the trace is written.
pub(crate) struct Trace {
    begun: Arc<AtomicBool>,
    #[expect(dead_code, reason = "flushes the trace when dropped")]
    guard: Option<FlushGuard>,
}

impl Trace {
    /// Allows the file to be made, once the request is accepted. A mistake in a recipe therefore leaves no trace file.
    pub(crate) fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }
}

/// Sends logs to stderr and spans to the trace file, if one was requested. `usual` is the level without any flag.
///
/// # Errors
/// `RUST_LOG` cannot be understood; the trace file is not empty or cannot be made.
pub(crate) fn start(
    verbosity: &Verbosity,
    usual: LevelFilter,
    trace: Option<&Path>,
    screen: &Screen,
) -> Result<Trace, Failure> {
    let colours = anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never;
    let logs = tracing_subscriber::fmt::layer()
        .compact()
        .without_time()
        .with_target(verbosity.verbose > 0)
        .with_ansi(colours)
        .log_internal_errors(false)
        .with_writer(screen.clone())
        .with_filter(filter(verbosity, usual)?);
    let begun = Arc::new(AtomicBool::new(false));
    let (spans, guard) = match trace {
        None => (None, None),
        Some(path) => {
            check_trace(path)?;
            let file = TraceFile::Waiting { path: path.to_owned(), held: Vec::new(), begun: begun.clone() };
            let (layer, guard) = ChromeLayerBuilder::new().writer(file).include_args(true).build();
            // Dependencies trace too, but not what takes the time.
            let ours = Targets::new().with_target("maskalign", LevelFilter::TRACE);
            (Some(layer.with_filter(ours)), Some(guard))
        }
    };
    tracing_subscriber::registry().with(logs).with(spans).init();
    Ok(Trace { begun, guard })
}

/// Refuses a place where no trace can be written, and a file that is not empty: it may be a recipe.
fn check_trace(path: &Path) -> Result<(), Failure> {
    let refuse = |why: &str| {
        let message = format!("cannot write the trace {}: {why}", path.display());
        Err(Failure::mistake(message).help("name a new file with `--trace`"))
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match path.metadata() {
        Ok(there) if there.is_dir() => refuse("it is a folder"),
        Ok(there) if there.len() > 0 => refuse("the file is there already and not empty"),
        Err(_) if folder.is_some_and(|folder| !folder.is_dir()) => refuse("its folder does not exist"),
        _ => Ok(()),
    }
}

fn filter(verbosity: &Verbosity, usual: LevelFilter) -> Result<EnvFilter, Failure> {
    let level = match (verbosity.quiet, verbosity.verbose) {
        (true, _) => LevelFilter::WARN,
        (_, 0) => usual,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) if !directives.is_empty() && level == usual => EnvFilter::try_new(&directives)
            .map_err(|error| Failure::mistake(format!("RUST_LOG is `{directives}`: {error}"))),
        _ => Ok(EnvFilter::default().add_directive(level.into())),
    }
}

/// The trace file, made once [`Trace::begin`] was called. A full disk ends the trace, not the run.
enum TraceFile {
    Waiting { path: PathBuf, held: Vec<u8>, begun: Arc<AtomicBool> },
    Open(BufWriter<File>),
    Failed,
}

impl TraceFile {
    /// Makes the file, with what was held back for it, if that is allowed by now.
    fn open(&mut self) -> io::Result<()> {
        if let TraceFile::Waiting { path, held, begun } = self
            && begun.load(Ordering::Acquire)
        {
            let mut file = BufWriter::new(File::create(path)?);
            file.write_all(held)?;
            *self = TraceFile::Open(file);
        }
        Ok(())
    }

    fn attempt(&mut self, write: impl FnOnce(&mut TraceFile) -> io::Result<()>) {
        if let Err(error) = self.open().and_then(|()| write(self)) {
            output::complain(&format!("the trace ends here: {error}\n"));
            *self = TraceFile::Failed;
        }
    }
}

impl Write for TraceFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.attempt(|file| match file {
            TraceFile::Waiting { held, .. } => {
                held.extend_from_slice(buffer);
                Ok(())
            }
            TraceFile::Open(file) => file.write_all(buffer),
            TraceFile::Failed => Ok(()),
        });
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt(|file| match file {
            TraceFile::Open(file) => file.flush(),
            TraceFile::Waiting { .. } | TraceFile::Failed => Ok(()),
        });
        Ok(())
    }
}

/// Lines of logs appear above a progress bar, not through it.
pub(crate) struct AboveBars(Screen);

impl Write for AboveBars {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.above(|| io::stderr().lock().write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}

impl<'a> MakeWriter<'a> for Screen {
    type Writer = AboveBars;

    fn make_writer(&'a self) -> AboveBars {
        AboveBars(self.clone())
    }
}
