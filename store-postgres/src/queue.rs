//! Commits that wait for a writer, and how they are taken in groups.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{Mutex, Notify, mpsc, oneshot};

use annals::{CommitError, Committed};

use crate::group::Prepared;

/// Commits that may wait; further callers wait for a place. Two groups' worth for each writer: one being written, one behind.
pub(crate) const QUEUE_COMMITS_MAX: usize = 4 * GROUP_COMMITS_MAX;
/// The most commits in a group: beyond this, a sync less per commit is not worth the wait of the first for the last.
const GROUP_COMMITS_MAX: usize = 512;
/// A group takes no further commit once it has this many rows.
const GROUP_ROWS_MAX: usize = 4_096;
/// A group takes no further commit once it has this many bytes of payload.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// Rows that wait behind one group and are worth another at the same time: the server takes longer for so many than for the
/// commit and the round trip around them.
const GROUP_ROWS_MIN: usize = 256;
/// A commit counts for so many rows beside its own there: behind each is a caller who waits.
const ROWS_PER_CALLER: usize = 7;

pub(crate) type Outcome = Result<Committed, CommitError>;

/// A commit and who waits for it. Nobody may: then the commit is written all the same.
pub(crate) struct Submission {
    pub(crate) commit: Prepared,
    pub(crate) answer: oneshot::Sender<Outcome>,
    pub(crate) passage: Passage,
}

/// What is under way, and how it comes.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    commits: AtomicUsize,
    /// Of those that wait, with what their callers count for.
    rows: AtomicUsize,
    /// There may be enough for another writer.
    long: Notify,
    /// The last group was of more than one commit.
    in_groups: AtomicBool,
}

/// A commit under way, until this is dropped.
pub(crate) struct Passage {
    traffic: Arc<Traffic>,
    /// As long as it waits.
    rows: usize,
}

impl Traffic {
    /// One more is under way; and whether it is the only one, and those before came alone, too. When many are answered at once,
    /// the first to come back is only ahead of the others.
    pub(crate) fn enter(self: &Arc<Self>) -> (Passage, bool) {
        let before = self.commits.fetch_add(1, Ordering::AcqRel);
        let passage = Passage { traffic: self.clone(), rows: 0 };
        (passage, before == 0 && !self.in_groups.load(Ordering::Acquire))
    }
}

impl Passage {
    /// It waits from now on, with so many rows.
    pub(crate) fn wait(&mut self, rows: usize) {
        let rows = rows + ROWS_PER_CALLER;
        self.rows = rows;
        let before = self.traffic.rows.fetch_add(rows, Ordering::AcqRel);
        if before < GROUP_ROWS_MIN && before + rows >= GROUP_ROWS_MIN {
            self.traffic.long.notify_one();
        }
    }

    fn wait_no_longer(&mut self) {
        self.traffic.rows.fetch_sub(std::mem::take(&mut self.rows), Ordering::AcqRel);
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.wait_no_longer();
        self.traffic.commits.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(crate) struct Queue {
    submissions: Mutex<mpsc::Receiver<Submission>>,
    traffic: Arc<Traffic>,
    /// The first writer has ended.
    done: Notify,
}

impl Queue {
    pub(crate) fn new(submissions: mpsc::Receiver<Submission>, traffic: Arc<Traffic>) -> Self {
        Self { submissions: Mutex::new(submissions), traffic, done: Notify::new() }
    }

    /// The next group: what is waiting, with no wait for more. `None` at the end.
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

    /// The next group for a second writer, who is there for what is too much for one: with few rows under way, two would take
    /// turns with half of them each, for twice as many round trips.
    pub(crate) async fn overflow(&self) -> Option<Vec<Submission>> {
        loop {
            tokio::select! {
                () = self.traffic.long.notified() => {}
                () = self.done.notified() => return None,
            }
            // The first one has it while it waits: then nothing does.
            let Ok(mut submissions) = self.submissions.try_lock() else { continue };
            if self.traffic.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN
                && let Ok(first) = submissions.try_recv()
            {
                return Some(self.group(first, &mut submissions));
            }
        }
    }

    fn group(&self, mut first: Submission, submissions: &mut mpsc::Receiver<Submission>) -> Vec<Submission> {
        first.passage.wait_no_longer();
        let (mut rows, mut bytes) = (first.commit.rows, first.commit.bytes);
        let mut group = vec![first];
        while group.len() < GROUP_COMMITS_MAX && rows < GROUP_ROWS_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(mut next) = submissions.try_recv() else { break };
            next.passage.wait_no_longer();
            rows += next.commit.rows;
            bytes += next.commit.bytes;
            group.push(next);
        }
        self.traffic.in_groups.store(group.len() > 1, Ordering::Release);
        // What it left is worth another all the same.
        if self.traffic.rows.load(Ordering::Acquire) >= GROUP_ROWS_MIN {
            self.traffic.long.notify_one();
        }
        group
    }
}
