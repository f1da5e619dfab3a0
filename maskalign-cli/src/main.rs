//! The `maskalign` command: the built-in components and nothing else.

fn main() -> std::process::ExitCode {
    maskalign_cli::main()
}
