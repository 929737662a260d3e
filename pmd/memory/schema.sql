-- The memory store, schema version 4 (`migrations.py` brings older files up to it). Integer ids are never reused
-- (AUTOINCREMENT). No wall-clock times: two builds from the same seed and rollouts have the same content.

CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- Training tasks. The embedding is that of `memory_key`, under the embedder that `meta` names, and never changes.
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task_id TEXT NOT NULL UNIQUE,
    domain TEXT NOT NULL,
    split TEXT NOT NULL CHECK (split = 'train'),
    memory_key TEXT NOT NULL,
    question TEXT NOT NULL,
    content_sha TEXT NOT NULL,
    answer_sha TEXT NOT NULL,        -- fingerprint of the normalised answer, for the leak filter
    answer_words INTEGER NOT NULL,   -- words in the normalised answer
    answer_chars INTEGER NOT NULL,   -- its letters and digits
    generation INTEGER NOT NULL,     -- the update that added it
    embedding BLOB                   -- float32, little endian; filled before the update commits
);

-- Level 0: attempts, thinking stripped.
CREATE TABLE experiences (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task_row INTEGER NOT NULL REFERENCES tasks (id),
    rollout_id TEXT NOT NULL,
    group_id TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    response TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    reward REAL NOT NULL,
    correct INTEGER NOT NULL CHECK (correct IN (0, 1)),
    verdict_status TEXT NOT NULL,
    answer TEXT,
    feedback TEXT NOT NULL,
    signature TEXT NOT NULL,         -- the text of a success, the error of a failure: distinct within a task
    support INTEGER NOT NULL DEFAULT 1,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'retired', 'quarantined')),
    generation INTEGER NOT NULL,
    last_generation INTEGER NOT NULL,
    UNIQUE (task_row, correct, signature)
);

-- Level 1: what the attempts at one task teach.
CREATE TABLE insights (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task_row INTEGER NOT NULL REFERENCES tasks (id),
    kind TEXT NOT NULL,
    content TEXT NOT NULL,
    policy_version INTEGER NOT NULL,       -- of the reflection that first wrote it
    last_policy_version INTEGER NOT NULL,  -- of the latest reflection that wrote it again
    version INTEGER NOT NULL DEFAULT 1,
    previous_id INTEGER REFERENCES insights (id),
    support INTEGER NOT NULL DEFAULT 1,    -- how often it was written for this task
    usefulness REAL,                       -- latest audit; NULL before the first
    leak TEXT NOT NULL DEFAULT '',         -- why the leak filter stopped it
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'internalized', 'retired', 'quarantined')),
    generation INTEGER NOT NULL,
    last_generation INTEGER NOT NULL,
    embedding BLOB,                        -- of active insights, where the embedder is costly; else computed when asked
    num_successes INTEGER NOT NULL DEFAULT 0,  -- of the group whose reflection wrote it last
    num_attempts INTEGER NOT NULL DEFAULT 0,   -- of that group; 0 where this is not known
    UNIQUE (task_row, kind, content)
);
CREATE INDEX insights_by_status ON insights (status, kind, content);

-- Level 2: what a cluster of insights over several tasks says.
CREATE TABLE behaviours (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    content TEXT NOT NULL,
    support INTEGER NOT NULL,              -- distinct tasks behind its members
    evidence_sha TEXT NOT NULL,            -- of the texts it was abstracted from: unchanged means nothing to redo
    policy_version INTEGER NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    usefulness REAL,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'internalized', 'retired', 'quarantined')),
    generation INTEGER NOT NULL,
    last_generation INTEGER NOT NULL,
    embedding BLOB
);

-- Provenance: the child (level, id) rests on the parent (level, id).
CREATE TABLE links (
    child_level INTEGER NOT NULL,
    child_id INTEGER NOT NULL,
    parent_level INTEGER NOT NULL,
    parent_id INTEGER NOT NULL,
    PRIMARY KEY (child_level, child_id, parent_level, parent_id)
) WITHOUT ROWID;
CREATE INDEX links_by_parent ON links (parent_level, parent_id);

-- What was handed to the teacher.
CREATE TABLE retrievals (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    generation INTEGER NOT NULL,           -- the memory that was read
    step INTEGER NOT NULL,
    group_id TEXT NOT NULL,
    level INTEGER NOT NULL,
    item_id INTEGER NOT NULL,
    rank INTEGER NOT NULL,
    similarity REAL NOT NULL,
    score REAL,
    included INTEGER NOT NULL DEFAULT 1    -- 0: chosen, but the prompt had no room for it
);

-- What an item did to the teacher in one group: log-probability of the attempts against a placebo, nats per token.
CREATE TABLE audits (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    generation INTEGER NOT NULL,
    step INTEGER NOT NULL,
    group_id TEXT NOT NULL,
    level INTEGER NOT NULL,
    item_id INTEGER NOT NULL,
    lift_correct REAL,
    lift_wrong REAL,
    usefulness REAL,
    masked_usefulness REAL,                -- with the answer span left out
    version INTEGER NOT NULL DEFAULT 1,    -- of the item
    num_correct INTEGER NOT NULL DEFAULT 0,
    num_wrong INTEGER NOT NULL DEFAULT 0,
    masked_lift_correct REAL,
    masked_lift_wrong REAL,
    student_lift REAL                      -- on correct attempts by the student, where it always solved the task
);
CREATE INDEX audits_by_item ON audits (level, item_id);

-- Append-only: every change of an item. JSON of what the change replaced: nothing for an addition, the changed columns
-- and parents for a change, the whole row for a deletion (embeddings left out: they follow from the texts).
CREATE TABLE ops (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    generation INTEGER NOT NULL,
    level INTEGER NOT NULL,
    item_id INTEGER NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('add', 'change', 'delete')),
    before TEXT,
    after TEXT,
    reason TEXT NOT NULL
);
CREATE INDEX ops_by_item ON ops (level, item_id);
CREATE INDEX ops_by_generation ON ops (generation);
