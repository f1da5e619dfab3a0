//! The pool under loom, which runs every interleaving of its threads and every value that a relaxed read may return,
//! within the bounds stated at each test.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering};

/// `pool.rs` once more, on loom's threads, locks and atomics.
#[path = "pool.rs"]
#[expect(clippy::duplicate_mod, unreachable_pub, reason = "compiled once more, for these tests alone")]
mod pool;

use pool::Pool;

/// Takes the place of the crate's `sync` for the module above.
mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};
    pub(crate) use loom::{hint, thread};

    /// One turn before a worker sleeps: each turn costs loom time, and one still covers all ways into and out of sleep.
    pub(crate) const SPINS: usize = 1;

    macro_rules! loom_thread_local {
        ($(#[$attribute:meta])* static $name:ident: $type:ty = const { $value:expr };) => {
            loom::thread_local! {
                $(#[$attribute])*
                static $name: $type = $value;
            }
        };
    }
    pub(crate) use loom_thread_local as thread_local;
}

/// Runs all executions in which threads are interrupted at most `interruptions` times.
fn explore(interruptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(interruptions);
    model.check(f);
}

/// Cells whose every access loom tracks, so that it finds data races.
struct Cells(Vec<UnsafeCell<usize>>);

// SAFETY: loom stops a test in which two threads use a cell without an order between them.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(count: usize) -> Cells {
        Cells((0..count).map(|_| UnsafeCell::new(0)).collect())
    }

    fn add(&self, at: usize) {
        // SAFETY: no reference to the cell leaves the closure.
        self.0[at].with_mut(|value| unsafe { *value += 1 });
    }

    fn values(&self) -> Vec<usize> {
        // SAFETY: as above.
        self.0.iter().map(|cell| cell.with(|value| unsafe { *value })).collect()
    }
}

#[test]
fn what_tasks_write_is_the_callers_once_and_whole() {
    // The second job meets a worker that is late for the first one, asleep, or on its way there; cells that live for
    // one job alone show a worker that is still inside after it.
    explore(3, || {
        let pool = Pool::new(2);
        assert_eq!(pool.threads(), 2);
        for _ in 0..2 {
            let cells = Cells::new(2);
            pool.run(2, &|task| cells.add(task));
            assert_eq!(cells.values(), [1, 1]);
        }
    });
}

#[test]
fn two_workers_share_a_job() {
    explore(2, || {
        let pool = Pool::new(3);
        let cells = Cells::new(2);
        pool.run(2, &|task| cells.add(task));
        assert_eq!(cells.values(), [1, 1]);
    });
}

#[test]
fn a_worker_misses_no_job_on_its_way_to_sleep() {
    explore(3, || {
        let pool = Pool::new(2);
        let arrived = AtomicUsize::new(0);
        // Each task waits for the other, so that the worker must come.
        pool.run(2, &|_| {
            arrived.fetch_add(1, Ordering::Relaxed);
            while arrived.load(Ordering::Relaxed) < 2 {
                loom::thread::yield_now();
            }
        });
    });
}

#[test]
fn callers_of_one_pool_take_turns_and_wait_for_their_own_tasks() {
    explore(2, || {
        let pool = Pool::new(2);
        let call = |pool: &Pool| {
            let cells = Cells::new(2);
            pool.run(2, &|task| cells.add(task));
            assert_eq!(cells.values(), [1, 1]);
        };
        let other = {
            let pool = Arc::clone(&pool);
            loom::thread::spawn(move || call(&pool))
        };
        call(&pool);
        other.join().expect("the other caller");
    });
}

#[test]
fn tasks_that_call_another_pool_end() {
    explore(2, || {
        let (outer, inner) = (Pool::new(2), Pool::new(1));
        let cells = Cells::new(4);
        outer.run(2, &|task| inner.run(2, &|nested| cells.add(2 * task + nested)));
        assert_eq!(cells.values(), [1; 4]);
    });
}

#[test]
fn panics_of_all_tasks_reach_the_caller_as_one_once_no_task_runs() {
    explore(2, || {
        let pool = Pool::new(2);
        let cells = Cells::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|task| {
                cells.add(task);
                panic_any(task);
            });
        }));
        let first = *result.expect_err("a panic is passed on").downcast::<usize>().expect("the number of a task");
        // Task 1 is not begun where task 0 panicked in time.
        assert!(first < 2 && cells.values()[first] == 1);
        drop(cells);
        let after = Cells::new(2);
        pool.run(2, &|task| after.add(task));
        assert_eq!(after.values(), [1, 1]);
    });
}
