//! What `docs/clusters.md` has a scheduler run.
#![cfg(target_os = "linux")]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use crate::support::{Sandbox, here};

/// The scripts of the page.
fn scripts() -> Vec<String> {
    let page = fs::read_to_string(here().join("../docs/clusters.md")).expect("a page");
    let blocks = page.split("```bash\n").skip(1);
    blocks.filter_map(|rest| Some(rest.split_once("```")?.0.to_owned())).collect()
}

/// A folder with programs that stand for the scheduler's.
fn stubs(sandbox: &Sandbox, srun: &str) -> String {
    let folder = sandbox.work().join("stubs");
    fs::create_dir_all(&folder).expect("a folder");
    let stub = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made a program");
    };
    stub("srun", srun);
    stub("scontrol", "echo \"$@\" >> requeued");
    let own = sandbox.work().parent().expect("a folder").display().to_string();
    format!("{}:{own}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}

fn bash(sandbox: &Sandbox, script: &Path, path: &str) -> Output {
    let mut command = Command::new("bash");
    command.arg(script).current_dir(sandbox.work()).env_clear().env("PATH", path);
    command.envs([("SLURM_CPUS_PER_TASK", "1"), ("SLURM_JOB_ID", "7"), ("RECIPE", "long.yaml"), ("OUT", "runs/job")]);
    command.output().expect("bash starts")
}

#[test]
fn the_scripts_start_stop_requeue_and_end() {
    let sandbox = Sandbox::new();
    let recipe = "name: long\nextends: good.yaml\nstages:\n  pretrain:\n    epochs: 10000\n";
    fs::write(sandbox.work().join("long.yaml"), recipe).expect("written");
    let scripts = scripts();
    assert_eq!(scripts.len(), 2);
    let file = |at: usize| sandbox.work().join(format!("{at}.sh"));
    for (at, script) in scripts.iter().enumerate() {
        fs::write(file(at), script).expect("written");
        let checked = Command::new("bash").arg("-n").arg(file(at)).output().expect("bash starts");
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
    // The scheduler's signal comes once some steps are made; a signal for more is passed on too.
    let job = "\"$@\" & child=$!\nuntil [ \"$(wc -l < runs/job/metrics.jsonl 2>/dev/null || echo 0)\" -ge 2 ]; do sleep 0.05; done\n\
               kill -TERM $child; wait $child";
    let stopped = bash(&sandbox, &file(0), &stubs(&sandbox, job));
    assert_eq!(stopped.status.code(), Some(143), "{}", String::from_utf8_lossy(&stopped.stderr));
    assert_eq!(fs::read_to_string(sandbox.work().join("requeued")).expect("it was requeued"), "requeue 7\n");
    let metrics = fs::read_to_string(sandbox.work().join("runs/job/metrics.jsonl")).expect("metrics");
    let steps = metrics.lines().count() + 2;
    for says in ["stage `pretrain` goes on from step", "the run is done"] {
        let ended = bash(&sandbox, &file(0), &stubs(&sandbox, &format!("exec \"$@\" --steps {steps}")));
        let text = String::from_utf8_lossy(&ended.stdout).into_owned() + &String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{text}");
        assert!(text.contains(says), "{text}");
    }
    assert_eq!(fs::read_to_string(sandbox.work().join("requeued")).expect("a file"), "requeue 7\n", "once");

    // Two jobs of an array at once.
    let path = stubs(&sandbox, "exec \"$@\" --steps 1");
    let ended: Vec<Output> = std::thread::scope(|scope| {
        let job = || scope.spawn(|| bash(&sandbox, &file(1), &path));
        [job(), job()].map(|job| job.join().expect("it ends")).into()
    });
    for output in ended {
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let last = bash(&sandbox, &file(1), &path);
    assert!(String::from_utf8_lossy(&last.stderr).contains("8 of 8 runs are done already"));
}
