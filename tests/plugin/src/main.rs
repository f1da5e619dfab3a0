use lattice_plugin as _;

fn main() -> std::process::ExitCode {
    maskalign_cli::main()
}
