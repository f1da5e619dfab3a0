//! The `maskalign` command, built for this package's tests.

fn main() -> std::process::ExitCode {
    maskalign_cli::main()
}
