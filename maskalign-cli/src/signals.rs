//! Ctrl-C and SIGTERM: the first asks the run to save its state and end, a second one ends the process at once.

use maskalign_core::run::{Stop, StopFlag};

use crate::output;

fn first(stop: &StopFlag, why: Stop, name: &str) {
    stop.request(why);
    output::complain(&format!("{name}: ending after this step with the state saved; once more ends at once\n"));
}

/// Raises `stop` when a signal asks this process to end.
#[cfg(unix)]
pub(crate) fn watch(stop: &StopFlag) -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
        low_level,
    };

    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let stop = stop.clone();
    let watcher = move || {
        for signal in signals.forever() {
            let (why, name) = match signal {
                SIGINT => (Stop::Interrupt, "Ctrl-C"),
                _ => (Stop::Terminate, "SIGTERM"),
            };
            match stop.get() {
                None => first(&stop, why, name),
                // Not `process::exit`: destructors and exit handlers may wait for the thread that is being ended.
                Some(_) => low_level::exit(i32::from(why.exit_code())),
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watcher).map(drop)
}

/// Raises `stop` when a signal asks this process to end.
#[cfg(not(unix))]
pub(crate) fn watch(stop: &StopFlag) -> std::io::Result<()> {
    let stop = stop.clone();
    let handler = move || match stop.get() {
        None => first(&stop, Stop::Interrupt, "Ctrl-C"),
        Some(_) => std::process::exit(i32::from(Stop::Interrupt.exit_code())),
    };
    ctrlc::set_handler(handler).map_err(std::io::Error::other)
}
