//! The pool on real threads. `model.rs` explores its interleavings.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Pool;

/// Rounds of a test; fewer under miri, where each takes a thousand times as long.
const ROUNDS: usize = if cfg!(miri) { 2 } else { 50 };

#[test]
fn every_task_runs_once_for_any_number_of_threads() {
    for threads in [1, 2, 3, 5] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 7, 100] {
            for _ in 0..ROUNDS {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task| _ = counts[task].fetch_add(1, Ordering::Relaxed));
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }
}

/// Waits until `count` tasks have arrived here, so that as many threads are inside at once.
fn meet(arrived: &AtomicUsize, count: usize) {
    arrived.fetch_add(1, Ordering::SeqCst);
    while arrived.load(Ordering::SeqCst) < count {
        std::thread::yield_now();
    }
}

/// The order in which a call on `pool` from inside a task ran its tasks, and that all ran on this thread.
fn nested_order(pool: &Pool, tasks: usize) -> Vec<usize> {
    let thread = std::thread::current().id();
    let order = Mutex::new(Vec::new());
    pool.run(tasks, &|task| {
        assert_eq!(std::thread::current().id(), thread);
        order.lock().expect("no task panicked").push(task);
    });
    order.into_inner().expect("no task panicked")
}

#[test]
fn a_call_from_inside_a_task_runs_on_the_same_thread_in_order() {
    let (pool, other) = (Pool::new(3), Pool::new(2));
    let arrived = AtomicUsize::new(0);
    pool.run(3, &|_| {
        // All three threads are inside when they turn to the same pools.
        meet(&arrived, 3);
        for pool in [&pool, &other, &Pool::new(2)] {
            assert_eq!(nested_order(pool, 4), [0, 1, 2, 3]);
        }
    });
}

#[test]
fn pools_that_call_each_other_from_several_threads_run_every_task_once() {
    let pools = [Pool::new(3), Pool::new(2), Pool::new(1)];
    let counts: Vec<AtomicUsize> = (0..3 * 4 * 4 * 4).map(|_| AtomicUsize::new(0)).collect();
    for _ in 0..ROUNDS {
        std::thread::scope(|scope| {
            for caller in 0..3 {
                let (pools, counts) = (&pools, &counts);
                scope.spawn(move || {
                    let [outer, middle, inner] = [0, 1, 2].map(|i| &pools[(caller + i) % 3]);
                    outer.run(4, &|a| {
                        middle.run(4, &|b| {
                            inner.run(2, &|c| {
                                outer.run(2, &|d| {
                                    let at = ((caller * 4 + a) * 4 + b) * 4 + 2 * c + d;
                                    counts[at].fetch_add(1, Ordering::Relaxed);
                                });
                            });
                        });
                    });
                });
            }
        });
    }
    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == ROUNDS));
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
    let pool = Pool::new(2);
    for bad in [0, 5, 19] {
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(20, &|task| assert_ne!(task, bad, "task {task} fails"));
        }));
        let payload = result.expect_err("the panic is passed on");
        let message = payload.downcast_ref::<String>().expect("a formatted message");
        assert!(message.contains(&format!("task {bad} fails")), "{message}");
    }
    let sum = AtomicUsize::new(0);
    pool.run(10, &|task| _ = sum.fetch_add(task, Ordering::Relaxed));
    assert_eq!(sum.into_inner(), 45);
}

/// A panic payload that panics when it is dropped.
struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[test]
fn a_second_panic_whose_message_panics_neither_ends_a_worker_nor_leaves_before_it() {
    let pool = Pool::new(2);
    for _ in 0..ROUNDS {
        let (arrived, inside) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|_| {
                inside.fetch_add(1, Ordering::SeqCst);
                meet(&arrived, 2);
                inside.fetch_sub(1, Ordering::SeqCst);
                panic_any(PanicsWhenDropped);
            });
        }));
        let first = result.expect_err("the panic is passed on");
        assert!(first.is::<PanicsWhenDropped>());
        std::mem::forget(first);
        assert_eq!(inside.into_inner(), 0);
    }
    let arrived = AtomicUsize::new(0);
    // Both threads are still there.
    pool.run(2, &|_| meet(&arrived, 2));
}

#[test]
fn callers_on_several_threads_take_turns() {
    let pool = Pool::new(2);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..4 * ROUNDS {
                    let sum = AtomicUsize::new(0);
                    pool.run(9, &|task| _ = sum.fetch_add(task, Ordering::Relaxed));
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
        pool.run(2, &|_| meet(&arrived, 2));
    }
}
