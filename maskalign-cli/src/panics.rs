//! A panic is a bug of this program: the user gets one line about it, not a backtrace.

use std::panic;

use maskalign_core::data::decode::is_guarded;

use crate::output;

/// Replaces the default message and backtrace. `RUST_BACKTRACE` brings the backtrace back, for the report.
pub(crate) fn install() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        // Those of a library on a damaged image are caught, and told as such.
        if is_guarded() {
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
