"""The lab's command line: it runs, tests, records, grades and reports what the lessons say."""
