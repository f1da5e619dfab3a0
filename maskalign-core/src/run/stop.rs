//! Requests to end a run early, or to save it, raised by signal handlers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Why a run is asked to end early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal is gone.
    HangUp,
}

impl Stop {
    /// The exit code of a process that saved its state and ended for this reason.
    pub fn exit_code(self) -> u8 {
        match self {
            Stop::Interrupt => 130,
            Stop::Terminate => 143,
            Stop::HangUp => 129,
        }
    }

    /// What the user knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Stop::Interrupt => "Ctrl-C",
            Stop::Terminate => "SIGTERM",
            Stop::HangUp => "SIGHUP",
        }
    }
}

/// A request to end that a signal handler raises and that stages look at between steps. Clones share the request.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    why: AtomicU8,
    save: AtomicBool,
    /// Odd while images are waited for; a number for each wait.
    waits: AtomicU64,
}

impl StopFlag {
    /// A flag that nobody raised.
    pub fn new() -> StopFlag {
        StopFlag::default()
    }

    /// Raises the flag; a single atomic store, so a signal handler may call it. The last request counts.
    pub fn request(&self, stop: Stop) {
        let value = match stop {
            Stop::Interrupt => 1,
            Stop::Terminate => 2,
            Stop::HangUp => 3,
        };
        self.0.why.store(value, Ordering::SeqCst);
    }

    /// The request, if there is one.
    pub fn get(&self) -> Option<Stop> {
        match self.0.why.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Stop::Interrupt),
            2 => Some(Stop::Terminate),
            _ => Some(Stop::HangUp),
        }
    }

    /// Asks for a checkpoint after the step that is being made; a single atomic store. The run goes on.
    pub fn request_save(&self) {
        self.0.save.store(true, Ordering::SeqCst);
    }

    /// Whether a checkpoint was asked for since this was last asked.
    pub fn take_save(&self) -> bool {
        self.0.save.swap(false, Ordering::SeqCst)
    }

    /// Waits for images by `wait`, and lets others see that this is what the run does: a file that never answers keeps it
    /// from looking at the flag.
    pub fn while_waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.0.waits.fetch_add(1, Ordering::SeqCst);
        let waited = wait();
        self.0.waits.fetch_add(1, Ordering::SeqCst);
        waited
    }

    /// The number of the wait for images that goes on, if one does.
    pub fn waiting(&self) -> Option<u64> {
        Some(self.0.waits.load(Ordering::SeqCst)).filter(|waits| waits % 2 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_request_and_its_exit_code() {
        let flag = StopFlag::new();
        let seen = flag.clone();
        assert_eq!(seen.get(), None);
        for (stop, code) in [(Stop::Interrupt, 130), (Stop::Terminate, 143), (Stop::HangUp, 129)] {
            flag.request(stop);
            assert_eq!(seen.get(), Some(stop));
            assert_eq!(stop.exit_code(), code);
        }
    }

    #[test]
    fn a_request_to_save_is_taken_once_and_ends_nothing() {
        let flag = StopFlag::new();
        assert!(!flag.take_save());
        flag.clone().request_save();
        assert_eq!((flag.get(), flag.take_save(), flag.take_save()), (None, true, false));
    }

    #[test]
    fn a_wait_is_seen_while_it_goes_on() {
        let flag = StopFlag::new();
        let seen = flag.clone();
        assert_eq!(seen.waiting(), None);
        let first = flag.while_waiting(|| seen.waiting());
        let second = flag.while_waiting(|| seen.waiting());
        assert!(first.is_some() && second.is_some() && first != second);
        assert_eq!(seen.waiting(), None);
    }
}
