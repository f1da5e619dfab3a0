//! Ctrl-C, SIGTERM and SIGHUP: the first asks the run to save its state and end, a second one ends the process at once.
//! SIGUSR1 asks it to save its state and go on.
//!
//! A run that waits for images cannot see the request; if no images come for [`PATIENCE`], the process ends without saving.

use std::{
    process::Child,
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use maskalign_core::run::{Stop, StopFlag};

use crate::output;

fn first(stop: &StopFlag, why: Stop) {
    stop.request(why);
    output::complain(&format!("{}: ending after this step with the state saved; once more ends at once\n", why.name()));
}

/// How long a run that was asked to end may wait for images: a file system that does not answer may never.
const PATIENCE: Duration = Duration::from_secs(10);

/// So long after a signal another one is its echo: a scheduler signals all processes of a job, and those that start others
/// pass the signal on to them.
#[cfg(unix)]
const ECHO: Duration = Duration::from_millis(500);

/// What a signal asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    /// To end, with the state saved.
    End(Stop),
    /// To save the state, and to go on.
    #[cfg_attr(not(unix), expect(dead_code, reason = "only Unix has the signal"))]
    Save,
}

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

/// Calls `handle` with every request, on a thread of its own.
#[cfg(unix)]
fn each(handle: impl Fn(Request) + Send + 'static) -> std::io::Result<()> {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
        iterator::Signals,
    };

    // `nohup` starts a process that ignores SIGHUP, so that it outlives the terminal.
    let hang_up = (!ignores(SIGHUP)).then_some(SIGHUP);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1].into_iter().chain(hang_up))?;
    let watcher = move || {
        for signal in signals.forever() {
            handle(match signal {
                SIGUSR1 => Request::Save,
                SIGINT => Request::End(Stop::Interrupt),
                SIGHUP => Request::End(Stop::HangUp),
                _ => Request::End(Stop::Terminate),
            });
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watcher).map(drop)
}

/// Raises `stop` when a signal asks this process to end, or to save its state.
#[cfg(unix)]
pub(crate) fn watch(stop: &StopFlag) -> std::io::Result<()> {
    use std::sync::{Mutex, PoisonError};

    let stop = stop.clone();
    let asked = Mutex::new(None::<Instant>);
    each(move |request| {
        let Request::End(why) = request else {
            output::complain("SIGUSR1: saving the state after this step, and going on\n");
            return stop.request_save();
        };
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        match *asked {
            None => {
                *asked = Some(Instant::now());
                first(&stop, why);
                if let Err(error) = end_if_stuck(&stop, why) {
                    tracing::warn!(%error, "cannot watch for images that never come");
                }
            }
            Some(at) if at.elapsed() < ECHO => {}
            // Not `process::exit`: destructors and exit handlers may wait for the thread that is being ended.
            Some(_) => signal_hook::low_level::exit(i32::from(why.exit_code())),
        }
    })
}

/// Every request that this process is sent from now on, for one that passes them on to others.
pub(crate) fn requests() -> std::io::Result<Receiver<Request>> {
    let (sender, receiver) = channel();
    let send = move |request| {
        // Where nobody listens any more, the process is about to end.
        let _ = sender.send(request);
    };
    #[cfg(unix)]
    each(send)?;
    #[cfg(not(unix))]
    ctrlc::set_handler(move || send(Request::End(Stop::Interrupt))).map_err(std::io::Error::other)?;
    Ok(receiver)
}

/// Sends a request on to a process that this one started. Where the system does that itself, as for a console's Ctrl-C, nothing is
/// left to do.
pub(crate) fn pass_on(request: Request, child: &Child) {
    #[cfg(unix)]
    {
        use rustix::process::{Pid, Signal, kill_process};
        let signal = match request {
            Request::End(Stop::Interrupt) => Signal::INT,
            Request::End(Stop::Terminate) => Signal::TERM,
            Request::End(Stop::HangUp) => Signal::HUP,
            Request::Save => Signal::USR1,
        };
        // It may have ended in the meantime.
        let _ = kill_process(Pid::from_child(child), signal);
    }
    #[cfg(not(unix))]
    let _ = (request, child);
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
