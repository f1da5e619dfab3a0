//! Every built-in component's contract, steps recorded from PyTorch, and that what is timed is what runs.

mod bench;
mod conformance;
mod verify;
