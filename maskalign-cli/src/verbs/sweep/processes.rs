//! The processes of a sweep: so many at a time, started, watched, and told when to stop.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::{self, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::RecvTimeoutError,
    time::{Duration, Instant},
};

use maskalign_core::run::Stop;

use super::{Job, State, taken};
use crate::{
    failure::Failure,
    signals::{self, Request},
    table::clock,
};

/// How often processes are looked at.
const TICK: Duration = Duration::from_millis(50);
/// So much of the end of a log is looked at for why a run failed.
const END: u64 = 16 * 1024;

/// How runs are started.
pub(super) struct Processes {
    pub(super) recipe: PathBuf,
    pub(super) folder: PathBuf,
    /// What every run is given besides its values.
    pub(super) flags: Vec<String>,
    pub(super) at_a_time: usize,
}

/// How a sweep ended.
#[derive(Default)]
pub(super) struct Ended {
    /// The request that stopped it.
    pub(super) stopped: Option<Stop>,
    /// The runs that failed, and why.
    pub(super) failed: Vec<(usize, String)>,
}

/// A process that goes on.
struct Running {
    job: usize,
    child: Child,
    since: Instant,
}

impl Running {
    /// Notes how it ended.
    fn end(&self, status: ExitStatus, jobs: &mut [Job], ended: &mut Ended, told: &dyn Fn(&str)) {
        let all = jobs.len();
        let job = &mut jobs[self.job];
        let time = clock(self.since.elapsed().as_secs_f64());
        // Two sweeps of one grid may come to a run at the same time. What had ended before is not what the other one made.
        let other = taken(&job.path).filter(|state| *state == State::Elsewhere || job.state == State::New);
        let text = match (status.success(), ended.stopped) {
            (true, _) => {
                job.state = State::Done;
                format!("done in {time}")
            }
            (false, Some(_)) => {
                job.state = State::Stopped;
                "stopped".to_owned()
            }
            (false, None) if other.is_some() => {
                job.state = other.unwrap_or(job.state);
                "another process has it".to_owned()
            }
            (false, None) => {
                let why = why(&log_path(&job.path)).unwrap_or_else(|| status.to_string());
                ended.failed.push((self.job, why.clone()));
                format!("failed: {why}")
            }
        };
        told(&format!("{} of {all}, {}: {text}\n", self.job + 1, job.name));
    }
}

/// The file that a run's output goes to.
pub(super) fn log_path(run: &Path) -> PathBuf {
    let mut name = run.file_name().map(OsString::from).unwrap_or_default();
    name.push(".log");
    run.with_file_name(name)
}

impl Processes {
    /// Runs what is not done yet, until all of it has ended.
    ///
    /// # Errors
    /// The folder cannot be made; a process cannot be started, or signals cannot be watched for.
    pub(super) fn run(&self, jobs: &mut [Job], told: &dyn Fn(&str)) -> Result<Ended, Failure> {
        let failed = |what: &str, error: std::io::Error| Failure::failed(format!("cannot {what}: {error}"));
        let requests = signals::requests().map_err(|error| failed("watch for signals", error))?;
        fs::create_dir_all(&self.folder)
            .map_err(|error| failed(&format!("create {}", self.folder.display()), error))?;
        let all = jobs.len();
        let is_open = |job: &Job| matches!(job.state, State::New | State::Stopped);
        let mut waiting: VecDeque<usize> = (0..all).filter(|at| is_open(&jobs[*at])).collect();
        let done = jobs.iter().filter(|job| job.state == State::Done).count();
        if done > 0 {
            told(&format!("{done} of {all} runs are done already\n"));
        }
        let mut ended = Ended::default();
        let mut running: Vec<Running> = Vec::new();
        while !running.is_empty() || (!waiting.is_empty() && ended.stopped.is_none()) {
            while running.len() < self.at_a_time && ended.stopped.is_none() {
                let Some(at) = waiting.pop_front() else { break };
                let say = |what: &str| told(&format!("{} of {all}, {}: {what}\n", at + 1, jobs[at].name));
                if taken(&jobs[at].path) == Some(State::Elsewhere) {
                    say("another process runs it");
                    jobs[at].state = State::Elsewhere;
                    continue;
                }
                say(jobs[at].state.word());
                match self.start(&jobs[at]) {
                    Ok(child) => running.push(Running { job: at, child, since: Instant::now() }),
                    Err(error) => {
                        // Those that go on are not left alone.
                        for one in &running {
                            signals::pass_on(Request::End(Stop::Terminate), &one.child);
                        }
                        for one in &mut running {
                            let _ = one.child.wait();
                        }
                        return Err(failed("start a run", error));
                    }
                }
            }
            match requests.recv_timeout(TICK) {
                Ok(request) => {
                    for one in &running {
                        signals::pass_on(request, &one.child);
                    }
                    if let Request::End(stop) = request {
                        if ended.stopped.is_none() {
                            let name = stop.name();
                            told(&format!("{name}: every run ends with its state saved; once more ends at once\n"));
                        }
                        ended.stopped.get_or_insert(stop);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
            }
            let mut still = Vec::new();
            for mut one in running {
                match one.child.try_wait() {
                    Ok(None) => still.push(one),
                    Ok(Some(status)) => one.end(status, jobs, &mut ended, told),
                    Err(error) => ended.failed.push((one.job, format!("its process is lost: {error}"))),
                }
            }
            running = still;
        }
        Ok(ended)
    }

    fn start(&self, job: &Job) -> std::io::Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(log_path(&job.path))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").arg(&self.recipe);
        command.args(job.sets.iter().flat_map(|set| ["--set", set.as_str()]));
        command.arg("--out").arg(&job.path).args(&self.flags);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // What a terminal sends goes to the sweep alone, which passes it on: a second signal would end a run at once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.spawn()
    }
}

/// The last error in a log.
fn why(log: &Path) -> Option<String> {
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END))).ok()?;
    let mut end = Vec::new();
    file.take(END).read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    let line = end.lines().rev().find_map(|line| line.strip_prefix("error"))?;
    Some(line.trim_start_matches([':', ' ']).to_owned())
}
