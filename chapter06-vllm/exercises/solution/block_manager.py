"""Task 1, block-manager: the reference solution."""


class BlockManager:
    def __init__(self, num_blocks, block_size):
        self.block_size = block_size
        self.users = [0] * num_blocks
        self.tables = {}

    @property
    def num_free(self):
        return self.users.count(0)

    def table(self, sequence):
        return list(self.tables.get(sequence, []))

    def grow(self, sequence, start, stop):
        if start == stop:
            return []
        table = self.table(sequence)
        needed = -(-stop // self.block_size)
        touched = range(start // self.block_size, min(needed, len(table)))
        shared = [place for place in touched if self.users[table[place]] > 1]
        spare = [block for block, count in enumerate(self.users) if count == 0]
        if len(shared) + max(0, needed - len(table)) > len(spare):
            return None
        copies = []
        for place in shared:
            copies.append((table[place], spare.pop()))
            self.users[table[place]] -= 1
            table[place] = copies[-1][1]
            self.users[table[place]] = 1
        while len(table) < needed:
            table.append(spare.pop())
            self.users[table[-1]] = 1
        self.tables[sequence] = table
        return copies

    def fork(self, parent, child):
        self.tables[child] = self.table(parent)
        for block in self.tables[child]:
            self.users[block] += 1

    def free(self, sequence):
        for block in self.tables.pop(sequence, []):
            self.users[block] -= 1
