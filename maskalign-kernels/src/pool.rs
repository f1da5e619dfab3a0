//! A thread pool whose jobs borrow from the caller and allocate nothing.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Turns of a waiting loop before a worker sleeps (of the order of 0.1 ms).
const SPINS: usize = 4000;

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
    workers: Vec<JoinHandle<()>>,
}

/// The task function of a job with its lifetime erased.
type Task = *const (dyn Fn(usize, usize) + Sync);

struct Shared {
    /// `OPEN` and the number of workers inside. Workers enter only through an open gate, and the
    /// caller leaves only once it is closed and empty, so `job` is never seen outside its lifetime.
    gate: AtomicUsize,
    /// Counts jobs, so that a worker joins each at most once.
    epoch: AtomicUsize,
    /// The current job. Written by the caller while the gate is closed and empty.
    job: Mutex<Option<Job>>,
    /// The next task to claim.
    next: AtomicUsize,
    panicked: AtomicBool,
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

thread_local! {
    /// The worker index of this thread while it runs a task.
    static WORKER: Cell<Option<usize>> = const { Cell::new(None) };
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
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name(format!("kernel-{worker}")).spawn(move || shared.work(worker)).ok()
            })
            .collect();
        Arc::new(Pool { shared, turn: Mutex::new(()), workers })
    }

    /// The number of threads, at least 1. Worker indices lie below it.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(task, worker)` once for every `task` below `tasks` and returns when all are done.
    ///
    /// Tasks are claimed in ascending order by whichever thread is free, so a result must not depend
    /// on `worker`; it only tells buffers of concurrent tasks apart. Called from inside a task, the
    /// tasks run one after another on that thread with its worker index. A panic in a task is
    /// passed on to the caller once no thread runs a task any more; tasks not yet begun are dropped.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        if let Some(worker) = WORKER.get() {
            for task in 0..tasks {
                f(task, worker.min(self.workers.len()));
            }
            return;
        }
        if tasks <= 1 || self.workers.is_empty() {
            let _inside = Inside::enter(0);
            for task in 0..tasks {
                f(task, 0);
            }
            return;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this function returns after the last use of `job`.
        let task = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), Task>(f) };
        let job = Job { task, tasks };
        *lock(&shared.job) = Some(job);
        shared.next.store(0, Ordering::Relaxed);
        shared.panicked.store(false, Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::Relaxed);
        shared.gate.store(OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = lock(&shared.sleep);
            shared.wake.notify_all();
        }
        shared.take_part(job, 0);
        shared.gate.fetch_and(!OPEN, Ordering::SeqCst);
        let mut turns = 0;
        while shared.gate.load(Ordering::Acquire) != 0 {
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        if shared.panicked.load(Ordering::Relaxed)
            && let Some(payload) = lock(&shared.panic).take()
        {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
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
    fn work(&self, worker: usize) {
        let mut seen = 0;
        while let Some(job) = self.await_job(&mut seen) {
            self.take_part(job, worker);
            self.gate.fetch_sub(ENTERED, Ordering::Release);
        }
    }

    /// Waits for a job later than `seen` and enters its gate; `None` when the pool ends.
    fn await_job(&self, seen: &mut usize) -> Option<Job> {
        let mut turns = 0;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(job) = self.try_enter(seen) {
                return Some(job);
            }
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // The sleeper announces itself before it looks again, the caller opens the gate before
            // it looks for sleepers: one of them sees the other.
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let mut sleep = lock(&self.sleep);
            while !self.stop.load(Ordering::SeqCst)
                && (self.gate.load(Ordering::SeqCst) & OPEN == 0 || self.epoch.load(Ordering::Relaxed) == *seen)
            {
                sleep = self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner);
            }
            drop(sleep);
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            turns = 0;
        }
    }

    fn try_enter(&self, seen: &mut usize) -> Option<Job> {
        let gate = self.gate.load(Ordering::Acquire);
        if gate & OPEN == 0 || self.epoch.load(Ordering::Relaxed) == *seen {
            return None;
        }
        self.gate.compare_exchange(gate, gate + ENTERED, Ordering::SeqCst, Ordering::Relaxed).ok()?;
        // Inside the gate neither the epoch nor the job changes.
        *seen = self.epoch.load(Ordering::Relaxed);
        *lock(&self.job)
    }

    /// Claims and runs tasks until none is left.
    fn take_part(&self, job: Job, worker: usize) {
        let _inside = Inside::enter(worker);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                // SAFETY: the caller waits in `Pool::run` until every thread has left the gate.
                unsafe { (*job.task)(task, worker) };
            }
        }));
        if let Err(payload) = result {
            self.next.store(job.tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
            self.panicked.store(true, Ordering::Relaxed);
        }
    }
}

/// Marks the thread as inside a task while it lives.
struct Inside;

impl Inside {
    fn enter(worker: usize) -> Inside {
        WORKER.set(Some(worker));
        Inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        WORKER.set(None);
    }
}

/// Locks, whether or not a panic was passed on while the lock was held: the pool keeps no invariant
/// across a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, &|task, worker| {
                        assert!(worker < threads);
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn a_nested_call_runs_on_the_same_thread_with_the_same_worker() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        pool.run(8, &|outer, worker| {
            let thread = std::thread::current().id();
            pool.run(4, &|inner, nested| {
                assert_eq!(nested, worker);
                assert_eq!(std::thread::current().id(), thread);
                sum.fetch_add(outer * 4 + inner, Ordering::Relaxed);
            });
        });
        assert_eq!(sum.into_inner(), (0..32).sum());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        for bad in [0, 5, 19] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, &|task, _| assert_ne!(task, bad, "task {task} fails"));
            }));
            let payload = result.expect_err("the panic is passed on");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert!(message.contains(&format!("task {bad} fails")), "{message}");
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, &|task, _| _ = sum.fetch_add(task, Ordering::Relaxed));
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        pool.run(9, &|task, _| _ = sum.fetch_add(task, Ordering::Relaxed));
                        assert_eq!(sum.into_inner(), 36);
                    }
                });
            }
        });
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = Pool::new(2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let arrived = AtomicUsize::new(0);
            // Each task waits for the other, so both threads must take part.
            pool.run(2, &|_, _| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }
}
