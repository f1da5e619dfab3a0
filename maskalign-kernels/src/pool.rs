//! A thread pool whose jobs borrow from the caller and allocate nothing.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, PoisonError};

use super::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use super::sync::{Condvar, Mutex, MutexGuard, SPINS, hint, thread};

/// Set in the gate while workers may join the current job.
const OPEN: usize = 1;
/// The gate counts the workers inside the job in units of this.
const ENTERED: usize = 2;

/// A fixed set of threads, the caller's among them, that run the tasks of one job at a time.
///
/// Workers wait for the next job with a short spin and then sleep.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held by the caller whose job runs; other callers wait.
    turn: Mutex<()>,
    workers: Vec<thread::JoinHandle<()>>,
}

/// The task function of a job with its lifetime erased.
type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// `OPEN` and the number of workers inside. Workers enter only through an open gate, and the
    /// caller leaves only once it is closed and empty, so `job` is never used outside its lifetime.
    gate: AtomicUsize,
    /// Counts jobs, so that a worker joins each at most once.
    epoch: AtomicUsize,
    /// The current job. Written by the caller while the gate is closed and empty.
    job: Mutex<Option<Job>>,
    /// The next task to claim.
    next: AtomicUsize,
    /// The panic payload of the first task that panicked in the current job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Job {
    task: Task,
    tasks: usize,
}

// SAFETY: the pointee is `Sync`, and `Pool::run` keeps it alive while a worker can reach it.
unsafe impl Send for Job {}

super::sync::thread_local! {
    /// Whether this thread runs a task of any pool.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

impl Pool {
    /// A pool of `threads` threads (at least one), the caller of [`run`](Self::run) being one.
    /// Where the system refuses a thread the pool has fewer.
    pub fn new(threads: usize) -> Arc<Pool> {
        let shared = Arc::new(Shared {
            gate: AtomicUsize::new(0),
            epoch: AtomicUsize::new(0),
            job: Mutex::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("kernel-{worker}")).spawn(move || shared.work()).ok()
            })
            .collect();
        Arc::new(Pool { shared, turn: Mutex::new(()), workers })
    }

    /// The number of threads, at least 1.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(task)` once for every `task` below `tasks` and returns when all are done.
    ///
    /// Tasks are claimed in ascending order by whichever thread is free. A task does not know its
    /// thread: it takes memory of its own by its number or from an [`Arena`](crate::Arena). Called
    /// from inside a task, of this pool or of another, the tasks run one after another on that
    /// thread. A panic in a task is passed on to the caller once no thread runs a task any more;
    /// tasks not yet begun are dropped, and so are the messages of further panics.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if INSIDE.with(Cell::get) {
            (0..tasks).for_each(f);
            return;
        }
        if tasks <= 1 || self.workers.is_empty() {
            let _inside = Inside::enter();
            (0..tasks).for_each(f);
            return;
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `closing` outlives the last use of `job`, and this
        // function does not return or unwind before it is dropped.
        let task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Task>(f) };
        let job = Job { task, tasks };
        let closing = shared.open(job);
        shared.take_part(job);
        drop(closing);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        {
            // A worker looks at `stop` under this lock before it sleeps.
            let _sleep = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a task, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Publishes a job and lets the workers in until the result is dropped.
    fn open(&self, job: Job) -> Closing<'_> {
        *lock(&self.job) = Some(job);
        self.next.store(0, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::Relaxed);
        self.gate.store(OPEN, Ordering::Release);
        let closing = Closing(self);
        // With its counterpart in `sleep_until_open`: either this thread sees the sleeper, or the
        // sleeper sees the open gate.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            let _sleep = lock(&self.sleep);
            self.wake.notify_all();
        }
        closing
    }

    fn work(&self) {
        let mut seen = 0;
        while let Some(job) = self.await_job(&mut seen) {
            self.take_part(job);
            self.gate.fetch_sub(ENTERED, Ordering::Release);
        }
    }

    /// Waits for a job later than `seen` and enters its gate; `None` when the pool ends.
    fn await_job(&self, seen: &mut usize) -> Option<Job> {
        loop {
            for _ in 0..SPINS {
                if self.stop.load(Ordering::Relaxed) {
                    return None;
                }
                if let Some(job) = self.try_enter(seen) {
                    return Some(job);
                }
                hint::spin_loop();
            }
            self.sleep_until_open(*seen);
        }
    }

    /// Sleeps until the gate is open to a job later than `seen`, or the pool ends.
    fn sleep_until_open(&self, seen: usize) {
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut sleep = lock(&self.sleep);
        while !self.stop.load(Ordering::Relaxed) && !self.is_open_after(seen) {
            sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
        }
        drop(sleep);
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    fn is_open_after(&self, seen: usize) -> bool {
        self.gate.load(Ordering::Acquire) & OPEN != 0 && self.epoch.load(Ordering::Relaxed) != seen
    }

    fn try_enter(&self, seen: &mut usize) -> Option<Job> {
        let gate = self.gate.load(Ordering::Acquire);
        if gate & OPEN == 0 || self.epoch.load(Ordering::Relaxed) == *seen {
            return None;
        }
        self.gate.compare_exchange(gate, gate + ENTERED, Ordering::Acquire, Ordering::Relaxed).ok()?;
        // Inside the gate neither the epoch nor the job changes.
        *seen = self.epoch.load(Ordering::Relaxed);
        *lock(&self.job)
    }

    /// Claims and runs tasks until none is left. Does not unwind.
    fn take_part(&self, job: Job) {
        let _inside = Inside::enter();
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                // SAFETY: the caller waits in `Pool::run` until every thread has left the gate.
                unsafe { (*job.task)(task) };
            }
        }));
        if let Err(payload) = result {
            self.next.store(job.tasks, Ordering::Relaxed);
            let mut first = lock(&self.panic);
            if first.is_none() {
                *first = Some(payload);
            } else {
                // Dropping it could panic once more, and out of here.
                std::mem::forget(payload);
            }
        }
    }
}

/// Closes the gate of a job and waits for the workers inside when dropped.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let gate = &self.0.gate;
        gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0;
        while gate.load(Ordering::Acquire) != 0 {
            turns += 1;
            if turns < SPINS {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }
}

/// Marks the thread as inside a task while it lives.
struct Inside;

impl Inside {
    fn enter() -> Inside {
        INSIDE.with(|inside| inside.set(true));
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(false));
    }
}

/// Locks. Nothing panics while it holds a lock of the pool, so no lock is ever poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
