//! The queue of commits that wait for a writer, and their division into groups.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{Mutex, Notify, mpsc, oneshot};

use annals::{CommitError, Committed};

use crate::group::Prepared;

/// The maximum number of commits in the queue; further callers wait. This is enough for two groups per writer: one
/// group that is being written, and one group that waits.
pub(crate) const QUEUE_COMMITS_MAX: usize = 4 * GROUP_COMMITS_MAX;
/// The maximum number of commits in a group. In a larger group, the first commit would wait too long for the last one,
/// and hardly any more syncs would be saved.
const GROUP_COMMITS_MAX: usize = 512;
/// A group takes no further commit once it has this many rows.
const GROUP_ROWS_MAX: usize = 4_096;
/// A group takes no further commit once it has this many bytes of payload.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// The number of waiting rows that justifies a second group while the first is being written. With this many rows, the
/// server spends more time on the rows than on the commit and the round trip.
const GROUP_ROWS_MIN: usize = 256;
/// Each waiting commit counts as this many rows in addition to its own rows, because a caller waits for the commit.
const ROWS_PER_CALLER: usize = 7;

pub(crate) type Outcome = Result<Committed, CommitError>;

/// A commit, and the channel to its caller. The commit is written even if the caller is gone.
pub(crate) struct Submission {
    pub(crate) commit: Prepared,
    pub(crate) answer: oneshot::Sender<Outcome>,
    pub(crate) guard: InFlightGuard,
}

/// Counts the commits in flight, and records whether they arrive one by one or in groups.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    commits: AtomicUsize,
    /// The number of rows of the waiting commits, plus `ROWS_PER_CALLER` for each of these commits.
    rows: AtomicUsize,
    /// Signals that enough rows for a second writer may be waiting.
    long: Notify,
    /// Whether the last group had more than one commit.
    in_groups: AtomicBool,
}

/// Counts a commit as in flight until this guard is dropped.
pub(crate) struct InFlightGuard {
    in_flight: Arc<InFlight>,
    /// The rows counted while the commit waits.
    rows: usize,
}

impl InFlight {
    /// Counts a commit as in flight. Also returns whether the commit can be written alone: no other commit is in
    /// flight, and the last group had only one commit. After a larger group, many callers are about to commit at the
    /// same time, and the first of them is only slightly ahead of the others.
    pub(crate) fn enter(self: &Arc<Self>) -> (InFlightGuard, bool) {
        let before = self.commits.fetch_add(1, Ordering::AcqRel);
        let guard = InFlightGuard { in_flight: self.clone(), rows: 0 };
        (guard, before == 0 && !self.in_groups.load(Ordering::Acquire))
    }
}

impl InFlightGuard {
    /// Counts the commit and its rows as waiting from now on.
    pub(crate) fn wait(&mut self, rows: usize) {
        let rows = rows + ROWS_PER_CALLER;
        self.rows = rows;
        let before = self.in_flight.rows.fetch_add(rows, Ordering::AcqRel);
        if before < GROUP_ROWS_MIN && before + rows >= GROUP_ROWS_MIN {
            self.in_flight.long.notify_one();
        }
    }

    fn wait_no_longer(&mut self) {
        self.in_flight.rows.fetch_sub(std::mem::take(&mut self.rows), Ordering::AcqRel);
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.wait_no_longer();
        self.in_flight.commits.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(crate) struct Queue {
    submissions: Mutex<mpsc::Receiver<Submission>>,
    in_flight: Arc<InFlight>,
    /// Signals to the second writer that the queue is closed and empty.
    done: Notify,
}

impl Queue {
    pub(crate) fn new(submissions: mpsc::Receiver<Submission>, in_flight: Arc<InFlight>) -> Self {
        Self { submissions: Mutex::new(submissions), in_flight, done: Notify::new() }
    }

    /// Waits for a commit, and returns the next group, which consists of all commits that are waiting at that time.
    /// Returns `None` once the queue is closed and empty.
    pub(crate) async fn next(&self) -> Option<Vec<Submission>> {
        let mut submissions = self.submissions.lock().await;
        match submissions.recv().await {
            Some(first) => Some(self.group(first, &mut submissions)),
            None => {
                self.done.notify_one();
                None
            }
        }
    }

    /// Returns the next group for the second writer, which helps when there are too many rows for one writer. With few
    /// rows in flight, two writers would alternate with half of the rows each, and take twice as many round trips.
    pub(crate) async fn overflow(&self) -> Option<Vec<Submission>> {
        loop {
            tokio::select! {
                () = self.in_flight.long.notified() => {}
                () = self.done.notified() => return None,
            }
            // While the first writer waits for commits, it holds this lock, and the queue is empty.
            let Ok(mut submissions) = self.submissions.try_lock() else { continue };
            if self.in_flight.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN
                && let Ok(first) = submissions.try_recv()
            {
                return Some(self.group(first, &mut submissions));
            }
        }
    }

    fn group(&self, mut first: Submission, submissions: &mut mpsc::Receiver<Submission>) -> Vec<Submission> {
        first.guard.wait_no_longer();
        let mut rows = first.commit.rows;
        let mut bytes = first.commit.bytes;
        let mut group = vec![first];
        while group.len() < GROUP_COMMITS_MAX && rows < GROUP_ROWS_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(mut next) = submissions.try_recv() else { break };
            next.guard.wait_no_longer();
            rows += next.commit.rows;
            bytes += next.commit.bytes;
            group.push(next);
        }
        self.in_flight.in_groups.store(group.len() > 1, Ordering::Release);
        // The remaining commits may still justify a second group.
        if self.in_flight.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN {
            self.in_flight.long.notify_one();
        }
        group
    }
}
