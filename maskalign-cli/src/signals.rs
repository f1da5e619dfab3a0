//! Ctrl-C, SIGTERM and SIGHUP: the first asks the run to save its state and end, a second one ends the process at once.
//!
//! A run that waits for images cannot see the request; if no images come for [`PATIENCE`], the process ends without saving.

use std::time::{Duration, Instant};

use maskalign_core::run::{Stop, StopFlag};

use crate::output;

fn first(stop: &StopFlag, why: Stop) {
    stop.request(why);
    output::complain(&format!("{}: ending after this step with the state saved; once more ends at once\n", why.name()));
}

/// How long a run that was asked to end may wait for images: a file system that does not answer may never.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ends the process if a run that was asked to end is still waiting for the same images.
#[cfg(unix)]
fn end_if_stuck(stop: &StopFlag, why: Stop) -> std::io::Result<()> {
    let stop = stop.clone();
    let watcher = move || {
        let mut since: Option<(u64, Instant)> = None;
        loop {
            std::thread::sleep(Duration::from_millis(200));
            since = match (stop.waiting(), since) {
                (Some(wait), Some((same, started))) if wait == same => {
                    if started.elapsed() >= PATIENCE {
                        let (name, seconds) = (why.name(), PATIENCE.as_secs());
                        output::complain(&format!(
                            "{name}: no image came for {seconds} s; ending without saving, `--resume` goes on from the last \
                             checkpoint\n"
                        ));
                        signal_hook::low_level::exit(i32::from(why.exit_code()));
                    }
                    Some((same, started))
                }
                (wait, _) => wait.map(|wait| (wait, Instant::now())),
            };
        }
    };
    std::thread::Builder::new().name("patience".into()).spawn(watcher).map(drop)
}

/// Raises `stop` when a signal asks this process to end.
#[cfg(unix)]
pub(crate) fn watch(stop: &StopFlag) -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM},
        iterator::Signals,
        low_level,
    };

    // `nohup` starts a process that ignores SIGHUP, so that it outlives the terminal.
    let hang_up = (!ignores(SIGHUP)).then_some(SIGHUP);
    let mut signals = Signals::new([SIGINT, SIGTERM].into_iter().chain(hang_up))?;
    let stop = stop.clone();
    let watcher = move || {
        for signal in signals.forever() {
            let why = match signal {
                SIGINT => Stop::Interrupt,
                SIGHUP => Stop::HangUp,
                _ => Stop::Terminate,
            };
            match stop.get() {
                None => {
                    first(&stop, why);
                    if let Err(error) = end_if_stuck(&stop, why) {
                        tracing::warn!(%error, "cannot watch for images that never come");
                    }
                }
                // Not `process::exit`: destructors and exit handlers may wait for the thread that is being ended.
                Some(_) => low_level::exit(i32::from(why.exit_code())),
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watcher).map(drop)
}

/// Whether this process was started with a signal ignored, where the system reports it.
#[cfg(unix)]
fn ignores(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Raises `stop` when a signal asks this process to end.
#[cfg(not(unix))]
pub(crate) fn watch(stop: &StopFlag) -> std::io::Result<()> {
    let stop = stop.clone();
    let handler = move || match stop.get() {
        None => first(&stop, Stop::Interrupt),
        Some(_) => std::process::exit(i32::from(Stop::Interrupt.exit_code())),
    };
    ctrlc::set_handler(handler).map_err(std::io::Error::other)
}
