//! A panic is a bug of this program: the user gets one line about it, not a backtrace.

use std::{
    cell::Cell,
    panic::{self, UnwindSafe},
};

use crate::output;

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

/// Replaces the default message and backtrace. `RUST_BACKTRACE` brings the backtrace back, for the report.
pub(crate) fn install() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if EXPECTED.get() {
            return;
        }
        let payload = info.payload();
        let literal = payload.downcast_ref::<&str>().copied();
        let message = literal.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let message = message.unwrap_or("no message").replace('\n', " ");
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        output::complain(&format!(
            "this is a bug in maskalign: {message}{place} (version {}); please report it with the command and the recipe at {}/issues\n",
            env!("CARGO_PKG_VERSION"),
            env!("CARGO_PKG_REPOSITORY"),
        ));
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            default(info);
        }
    }));
}

/// Runs code that may panic as a way of saying no, such as the bindings of a driver that is not installed, and that
/// catches its panics itself.
pub(crate) fn expected<T>(f: impl FnOnce() -> T + UnwindSafe) -> T {
    EXPECTED.set(true);
    let outcome = panic::catch_unwind(f);
    EXPECTED.set(false);
    outcome.unwrap_or_else(|payload| panic::resume_unwind(payload))
}
