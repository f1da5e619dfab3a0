//! Logs to stderr, and the trace file.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
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

/// What must live as long as the trace is written.
pub(crate) struct Trace(#[expect(dead_code, reason = "flushes the trace when dropped")] Option<FlushGuard>);

/// Sends logs to stderr and spans to the trace file, where there is to be one. `usual` is the level without any flag.
///
/// # Errors
/// `RUST_LOG` cannot be understood; the trace file cannot be made.
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
    let (spans, guard) = match trace {
        None => (None, None),
        Some(path) => {
            let file = File::create(path)
                .map_err(|error| Failure::mistake(format!("cannot write the trace {}: {error}", path.display())))?;
            let (layer, guard) =
                ChromeLayerBuilder::new().writer(TraceFile::Open(BufWriter::new(file))).include_args(true).build();
            // Dependencies trace too, but not what takes the time.
            let ours = Targets::new().with_target("maskalign", LevelFilter::TRACE);
            (Some(layer.with_filter(ours)), Some(guard))
        }
    };
    tracing_subscriber::registry().with(logs).with(spans).init();
    Ok(Trace(guard))
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

/// The trace file. A full disk ends the trace, not the run.
enum TraceFile {
    Open(BufWriter<File>),
    Failed,
}

impl TraceFile {
    fn attempt<T>(&mut self, otherwise: T, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>) -> io::Result<T> {
        let TraceFile::Open(file) = self else {
            return Ok(otherwise);
        };
        let outcome = write(file);
        if let Err(error) = &outcome {
            output::complain(&format!("the trace ends here: {error}\n"));
            *self = TraceFile::Failed;
        }
        Ok(outcome.unwrap_or(otherwise))
    }
}

impl Write for TraceFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.attempt(buffer.len(), |file| file.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt((), BufWriter::flush)
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
